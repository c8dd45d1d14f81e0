use std::time::Duration;

use rand::{SeedableRng, rngs::SmallRng};

use super::*;
use crate::{
    hello::SessionKind,
    id::{RuleId, SecretHash},
    refusal::Code,
    resume::{LIFE, ResumeKeys, Revoked},
    rules::{Effect, Match, Rule, RuleSpec},
};

const WALL: WallTime = WallTime::from_unix_ms(1_000);

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(11)
}

fn label(text: &str) -> Label {
    Label::parse(text).unwrap().unwrap()
}

fn hello(firmware: &str) -> Hello {
    Hello {
        external_id: None,
        device: "9b0c2e4a-11d2-7f00-8000-0000000000aa".parse().unwrap(),
        credential: Some(SecretHash::of(b"right").into()),
        firmware: Some(label(firmware)),
        model: None,
        tenant: None,
        slot: None,
        resume: None,
        session_kind: SessionKind::Plain,
        protocol: None,
        websocket_key: [b'A'; 24],
    }
}

fn record(state: DeviceState) -> DeviceRecord {
    DeviceRecord {
        id: hello("1").device,
        tenant: label("acme"),
        model: Some(label("cam")),
        secret: SecretHash::of(b"right"),
        previous_secret: None,
        state,
    }
}

fn rules(matches: Match) -> RuleSet {
    let rule = Rule {
        id: RuleId(uuid::Uuid::from_u128(1)),
        spec: RuleSpec {
            reason: "broken radio".into(),
            retry_after: Duration::from_secs(900),
            ..RuleSpec::new(matches, Effect::Block)
        },
        created_at: WALL,
        revision: 1,
    };
    RuleSet::compile(1, vec![rule])
}

fn firmware(range: &str) -> Match {
    Match {
        firmware: Some(range.parse().unwrap()),
        ..Match::default()
    }
}

fn screen_by(hello: Hello, rules: &RuleSet, draining: Option<Peers>) -> Result<Screened, Code> {
    let policy = Policy {
        rules,
        draining,
        wall: WALL,
    };
    screen(hello, &policy, &mut rng()).map_err(|refusal| refusal.code)
}

fn conclude_by(hello: Hello, record: Option<&DeviceRecord>, rules: &RuleSet) -> Result<Admitted, Refusal> {
    let Screened { hello, credential } = screen_by(hello, &RuleSet::empty(), None).unwrap();
    let unproven = Unproven {
        hello,
        credential,
        vouched: None,
    };
    conclude(unproven, record, Generation(7), rules, WALL, &mut rng())
}

#[test]
fn draining_comes_before_rules_and_rules_before_the_credential() {
    let blocking = rules(firmware(">=3"));
    let anonymous = || Hello {
        credential: None,
        ..hello("3.8.0")
    };

    let draining = screen_by(anonymous(), &blocking, Some(Peers::None)).unwrap_err();
    let blocked = screen_by(anonymous(), &blocking, None).unwrap_err();
    let unauthorized = screen_by(anonymous(), &RuleSet::empty(), None).unwrap_err();

    assert_eq!(draining, Code::Draining);
    assert_eq!(blocked, Code::FirmwareBlocked);
    assert_eq!(unauthorized, Code::Unauthorized);
    assert!(screen_by(hello("2.0"), &blocking, None).is_ok());
}

#[test]
fn unknown_wrong_missing_and_revoked_are_one_answer() {
    let wrong = Hello {
        credential: Some(SecretHash::of(b"wrong").into()),
        ..hello("1")
    };
    let missing = Hello {
        credential: None,
        ..hello("1")
    };
    let rules = RuleSet::empty();
    let policy = Policy {
        rules: &rules,
        draining: None,
        wall: WALL,
    };

    let answers = [
        conclude_by(hello("1"), None, &rules).unwrap_err(),
        conclude_by(wrong.clone(), Some(&record(DeviceState::Enabled)), &rules).unwrap_err(),
        conclude_by(wrong, Some(&record(DeviceState::Disabled)), &rules).unwrap_err(),
        conclude_by(hello("1"), Some(&record(DeviceState::Revoked)), &rules).unwrap_err(),
        screen(missing, &policy, &mut rng()).unwrap_err(),
    ];

    assert_eq!(answers[0].code, Code::Unauthorized);
    let bytes = answers.map(|refusal| {
        let mut out = Vec::new();
        refusal.write_response(&mut out);
        out
    });
    assert!(bytes.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn disabled_is_told_only_to_the_right_credential_and_before_rules() {
    let blocking = rules(firmware(">=1"));

    let refusal = conclude_by(hello("1"), Some(&record(DeviceState::Disabled)), &blocking).unwrap_err();

    assert_eq!(refusal.code, Code::DeviceDisabled);
}

#[test]
fn registry_s_tenant_and_model_are_judged_after_the_look_up() {
    let by_tenant = rules(Match {
        tenant: Some(label("acme")),
        ..Match::default()
    });
    let by_model = rules(Match {
        model: Some(label("cam")),
        ..Match::default()
    });
    let record = record(DeviceState::Enabled);
    let other_model = Hello {
        model: Some(label("tv")),
        ..hello("1")
    };

    assert!(screen_by(hello("1"), &by_tenant, None).is_ok());
    let code = |result: Result<Admitted, Refusal>| result.unwrap_err().code;
    assert_eq!(
        code(conclude_by(hello("1"), Some(&record), &by_tenant)),
        Code::FirmwareBlocked
    );
    assert_eq!(
        code(conclude_by(hello("1"), Some(&record), &by_model)),
        Code::FirmwareBlocked
    );
    assert!(conclude_by(other_model, Some(&record), &by_model).is_ok());
}

#[test]
fn registry_s_tenant_counts_over_the_claim() {
    let claiming = Hello {
        tenant: Some(label("other")),
        ..hello("1")
    };

    let admitted = conclude_by(claiming, Some(&record(DeviceState::Enabled)), &RuleSet::empty()).unwrap();

    assert_eq!(admitted.tenant().as_str(), "acme");
    assert_eq!(admitted.model.as_deref(), Some("cam"));
}

#[test]
fn blocked_device_is_told_the_rule_and_its_reason() {
    let blocking = rules(firmware(">=3"));
    let policy = Policy {
        rules: &blocking,
        draining: None,
        wall: WALL,
    };

    let refusal = screen(hello("3.8.0-b3+x"), &policy, &mut rng());

    let refusal = refusal.unwrap_err();
    assert_eq!(refusal.detail, "broken radio");
    assert_eq!(refusal.rule, Some(RuleId(uuid::Uuid::from_u128(1))));
    let after_ms = refusal.hint.unwrap().after_ms();
    assert!((900_000..=1_800_000).contains(&after_ms));
}

const RESUME_KEYS: ResumeKeys = ResumeKeys::new(1, [3; 32]);

/// A device that was admitted before, with the token of then.
fn returning(firmware: &str) -> Hello {
    let admitted = conclude_by(hello(firmware), Some(&record(DeviceState::Enabled)), &RuleSet::empty()).unwrap();
    let minted = admitted.grant.mint(&RESUME_KEYS, SessionId(5), LIFE, WALL).unwrap();
    Hello {
        resume: Some(minted.text),
        ..hello(firmware)
    }
}

fn resume_by(hello: Hello, revoked: &Revoked, rules: &RuleSet) -> Resumption {
    let screened = screen_by(hello, &RuleSet::empty(), None).unwrap();
    let judge = Judge {
        keys: &RESUME_KEYS,
        revoked,
        is_stale: false,
    };
    resume(screened, &judge, rules, WALL, &mut rng())
}

fn none_revoked() -> Revoked {
    Revoked::of(Generation(7), Generation(0), [])
}

#[test]
fn returning_device_is_admitted_by_its_token_without_a_look_up() {
    let resumption = resume_by(returning("1"), &none_revoked(), &RuleSet::empty());

    let Next::Session(admitted) = resumption.next else {
        panic!("{:?}", resumption.next);
    };
    assert_eq!(resumption.outcome, Some(ResumeOutcome::Resumed));
    assert_eq!(admitted.tenant().as_str(), "acme");
    assert_eq!(admitted.model.as_deref(), Some("cam"));
    assert_eq!(admitted.resumed, Some(SessionId(5)));
}

#[test]
fn token_that_does_not_count_is_ignored_and_none_is_no_outcome() {
    let mut revoked = none_revoked();
    revoked.revoke(hello("1").device, Generation(8));
    let stolen = Hello {
        credential: Some(SecretHash::of(b"wrong").into()),
        ..returning("1")
    };

    for (hello, revoked, outcome) in [
        (hello("1"), none_revoked(), None),
        (returning("1"), revoked, Some(ResumeOutcome::Revoked)),
        (stolen, none_revoked(), Some(ResumeOutcome::Invalid)),
    ] {
        let resumption = resume_by(hello, &revoked, &RuleSet::empty());

        assert!(matches!(resumption.next, Next::LookUp(_)));
        assert_eq!(resumption.outcome, outcome);
    }
}

#[test]
fn token_that_counted_once_vouches_for_the_tenant_and_a_stolen_one_does_not() {
    let mut revoked = none_revoked();
    revoked.revoke(hello("1").device, Generation(8));
    let stolen = Hello {
        credential: Some(SecretHash::of(b"wrong").into()),
        ..returning("1")
    };

    for (hello, tenant) in [(returning("1"), Some("acme")), (stolen, None), (hello("1"), None)] {
        let Next::LookUp(unproven) = resume_by(hello, &revoked, &RuleSet::empty()).next else {
            panic!("it is to be looked up");
        };

        assert_eq!(unproven.vouched().map(Label::as_str), tenant);
    }
}

#[test]
fn rules_by_registry_data_win_over_the_token() {
    let by_tenant = rules(Match {
        tenant: Some(label("acme")),
        ..Match::default()
    });
    let by_model = rules(Match {
        model: Some(label("cam")),
        ..Match::default()
    });

    for rules in [by_tenant, by_model] {
        let resumption = resume_by(returning("1"), &none_revoked(), &rules);

        assert!(matches!(resumption.next, Next::Refused(refusal) if refusal.code == Code::FirmwareBlocked));
        assert_eq!(resumption.outcome, Some(ResumeOutcome::Blocked));
    }
}

#[test]
fn certificate_is_a_credential_and_the_registry_still_decides() {
    let by_certificate = || Hello {
        credential: Some(Credential::of_certificate(b"der")),
        ..hello("1")
    };

    let admitted = conclude_by(by_certificate(), Some(&record(DeviceState::Enabled)), &RuleSet::empty()).unwrap();
    let disabled = conclude_by(
        by_certificate(),
        Some(&record(DeviceState::Disabled)),
        &RuleSet::empty(),
    );
    let unknown = conclude_by(by_certificate(), None, &RuleSet::empty());

    assert_eq!(admitted.grant.credential, Credential::of_certificate(b"der"));
    assert_eq!(disabled.unwrap_err().code, Code::DeviceDisabled);
    assert_eq!(unknown.unwrap_err().code, Code::Unauthorized);
}

#[test]
fn old_credential_of_a_rotation_is_granted_until_it_ends() {
    let until = WallTime::from_unix_ms(5_000);
    let rotated = DeviceRecord {
        secret: SecretHash::of(b"new"),
        previous_secret: Some((SecretHash::of(b"right"), until)),
        ..record(DeviceState::Enabled)
    };

    let admitted = conclude_by(hello("1"), Some(&rotated), &RuleSet::empty()).unwrap();

    assert_eq!(admitted.grant.credential_until, Some(until));
    let fresh = conclude_by(hello("1"), Some(&record(DeviceState::Enabled)), &RuleSet::empty()).unwrap();
    assert_eq!(fresh.grant.credential_until, None);
}
