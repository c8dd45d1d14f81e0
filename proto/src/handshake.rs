//! The order of decisions about a connecting device, written once (contract section 2). Gateway and simulator both come through here.
//!
//! Each step takes the state before it and gives the state behind it, so that none can be left out or done twice:
//!
//! ```text
//! Hello ──screen──▶ Screened ──(resume token, throttles, admission, look-up)──▶ conclude ──▶ Admitted
//! ```
//!
//! What stands in brackets belongs to admission and to the registry; a device that does not
//! get through it is refused by them. Everything before it costs no query.

use rand::Rng;

use crate::{
    hello::Hello,
    id::{DeviceId, Label, SecretHash},
    record::{DeviceRecord, DeviceState},
    refusal::{Peers, Refusal},
    rules::{Rule, RuleSet, Subject},
    time::WallTime,
};

/// What the node decides by before it looks a device up.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    pub rules: &'a RuleSet,
    /// Set while this node is leaving.
    pub draining: Option<Peers>,
    pub wall: WallTime,
}

/// A device that may be looked up: no rule refuses what it says of itself, and it has shown a credential.
#[derive(Debug)]
pub struct Screened {
    hello: Hello,
    credential: SecretHash,
}

/// A device that is registered, authenticated and welcome.
#[derive(Debug)]
pub struct Admitted {
    pub hello: Hello,
    /// The registry's, whatever the device claimed.
    pub tenant: Label,
    /// The device's own word, else the registry's.
    pub model: Option<Label>,
}

/// Draining, then rules on what the device says of itself, then whether it shows a credential at all. No query, no token.
///
/// # Errors
/// `draining`, `firmware_blocked` or `unauthorized`.
pub fn screen(hello: Hello, policy: &Policy<'_>, rng: &mut impl Rng) -> Result<Screened, Refusal> {
    if let Some(peers) = policy.draining {
        return Err(Refusal::draining(peers, rng));
    }
    let claims = Subject {
        firmware: hello.firmware.as_deref(),
        model: hello.model.as_deref(),
        // A tenant that it does not name is not known yet: rules on tenants wait for the registry.
        tenant: hello.tenant.as_deref(),
    };
    if let Some(rule) = policy.rules.evaluate(&claims, policy.wall) {
        return Err(blocked(rule, rng));
    }
    match hello.credential {
        Some(credential) => Ok(Screened { hello, credential }),
        None => Err(Refusal::unauthorized(rng)),
    }
}

impl Screened {
    /// What the device says of itself.
    #[must_use]
    pub const fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The key to look up.
    #[must_use]
    pub const fn device(&self) -> DeviceId {
        self.hello.device
    }
}

/// Whether the credential is right, then whether the device is disabled, then rules by the registry's data.
///
/// `record` is the answer of the look-up; `None` where the device is not registered. Unknown, wrong and revoked are one
/// answer, so that nobody learns which ids exist.
///
/// # Errors
/// `unauthorized`, `device_disabled` or `firmware_blocked`.
pub fn conclude(
    screened: Screened,
    record: Option<&DeviceRecord>,
    rules: &RuleSet,
    wall: WallTime,
    rng: &mut impl Rng,
) -> Result<Admitted, Refusal> {
    let Screened { hello, credential } = screened;
    let Some(record) = record.filter(|record| record.accepts(&credential, wall)) else {
        return Err(Refusal::unauthorized(rng));
    };
    match record.state {
        DeviceState::Enabled => {}
        DeviceState::Disabled => return Err(Refusal::device_disabled(rng)),
        DeviceState::Revoked => return Err(Refusal::unauthorized(rng)),
    }
    let model = hello.model.clone().or_else(|| record.model.clone());
    let known = Subject {
        firmware: hello.firmware.as_deref(),
        model: model.as_deref(),
        tenant: Some(record.tenant.as_str()),
    };
    if let Some(rule) = rules.evaluate(&known, wall) {
        return Err(blocked(rule, rng));
    }
    Ok(Admitted {
        hello,
        tenant: record.tenant.clone(),
        model,
    })
}

fn blocked(rule: &Rule, rng: &mut impl Rng) -> Refusal {
    Refusal::firmware_blocked(rule.id, &rule.spec.reason, rule.spec.retry_after, rng)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;
    use crate::{
        hello::SessionKind,
        id::RuleId,
        refusal::Code,
        rules::{Effect, Match, RuleSpec},
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
            device: "9b0c2e4a-11d2-7f00-8000-0000000000aa".parse().unwrap(),
            credential: Some(SecretHash::of(b"right")),
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
        let screened = screen_by(hello, &RuleSet::empty(), None).unwrap();
        conclude(screened, record, rules, WALL, &mut rng())
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
            credential: Some(SecretHash::of(b"wrong")),
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

        assert_eq!(admitted.tenant.as_str(), "acme");
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
}
