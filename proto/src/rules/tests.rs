//! Rule sets compared with a matcher that checks every rule, parsing of rules, previews.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;

use super::{Beside, Effect, Match, Mode, Preview, Rule, RuleSet, RuleSpec, Ruling, Seen, SpecError, Subject, Verdict};
use crate::{
    id::{DeviceId, Label, RuleId},
    time::WallTime,
};

const NOON: WallTime = WallTime::from_unix_ms(1_000_000);

fn label(text: &str) -> Label {
    Label::parse(text).unwrap().unwrap()
}

fn blocks(firmware: &str) -> RuleSpec {
    let matches = Match {
        firmware: Some(firmware.parse().unwrap()),
        ..Match::default()
    };
    RuleSpec::new(matches, Effect::Block)
}

fn rule(id: u128, created_ms: u64, spec: RuleSpec) -> Rule {
    Rule {
        id: RuleId(Uuid::from_u128(id)),
        spec,
        created_at: WallTime::from_unix_ms(created_ms),
        revision: 1,
    }
}

fn stating(firmware: &str) -> Subject<'_> {
    Subject {
        firmware: Some(firmware),
        ..Subject::default()
    }
}

fn found(set: &RuleSet, subject: Subject<'_>, wall: WallTime) -> Option<u128> {
    set.verdict(&subject, wall)
        .enforced
        .map(|ruling| ruling.rule().id.0.as_u128())
}

#[test]
fn the_rule_that_lasts_longest_counts_then_the_oldest() {
    let with = |expires_ms: Option<u64>| RuleSpec {
        expires_at: expires_ms.map(WallTime::from_unix_ms),
        ..blocks(">=3.8")
    };
    let set = RuleSet::compile(
        7,
        vec![
            rule(3, 3, with(Some(2_000_000))),
            rule(4, 5, with(Some(3_000_000))),
            rule(5, 4, with(Some(3_000_000))),
        ],
    );

    assert_eq!(set.revision(), 7);
    assert_eq!(found(&set, stating("3.8"), NOON), Some(5));
    assert_eq!(found(&set, stating("3.8"), WallTime::from_unix_ms(2_999_999)), Some(5));
    assert_eq!(found(&set, stating("3.8"), WallTime::from_unix_ms(3_000_000)), None);
    assert_eq!(found(&set, stating("3.7"), NOON), None);
}

#[test]
fn rules_ask_for_model_and_tenant_of_the_very_same_text() {
    let with = |model: Option<&str>, tenant: Option<&str>, firmware: Option<&str>| {
        let matches = Match {
            firmware: firmware.map(|text| text.parse().unwrap()),
            model: model.map(label),
            tenant: tenant.map(label),
        };
        RuleSpec::new(matches, Effect::Block)
    };
    let set = RuleSet::compile(
        1,
        vec![
            rule(1, 1, with(Some("cam"), Some("acme"), Some("=1"))),
            rule(2, 2, with(Some("cam"), None, Some("=2"))),
            rule(3, 3, with(None, Some("acme"), Some("=3"))),
            rule(4, 4, with(None, None, Some("=4"))),
            rule(5, 5, with(Some("lock"), None, None)),
        ],
    );
    let asked = |firmware, model, tenant| {
        let subject = Subject {
            device: None,
            firmware: Some(firmware),
            model,
            tenant,
        };
        found(&set, subject, NOON)
    };

    assert_eq!(asked("1", Some("cam"), Some("acme")), Some(1));
    assert_eq!(asked("1", Some("cam"), None), None);
    assert_eq!(asked("1", Some("Cam"), Some("acme")), None);
    assert_eq!(asked("2", Some("cam"), Some("other")), Some(2));
    assert_eq!(asked("3", None, Some("acme")), Some(3));
    assert_eq!(asked("3", Some("cam"), Some("other")), None);
    assert_eq!(asked("4", None, None), Some(4));
    assert_eq!(asked("4", Some("lock"), Some("acme")), Some(4));
    assert_eq!(asked("whatever", Some("lock"), None), Some(5));
    assert_eq!(asked("", Some("lock"), None), Some(5));
}

#[test]
fn missing_versions_and_versions_without_a_digit_meet_their_own_rules_only() {
    let set = RuleSet::compile(
        1,
        vec![
            rule(1, 1, blocks("=(none)")),
            rule(2, 2, blocks("=Main")),
            rule(3, 3, blocks("!=3.8")),
            rule(4, 4, blocks(">=0")),
        ],
    );

    assert_eq!(found(&set, Subject::default(), NOON), Some(1));
    assert_eq!(found(&set, stating("  "), NOON), Some(1));
    assert_eq!(found(&set, stating("(none)"), NOON), Some(1));
    assert_eq!(found(&set, stating("mAIN+abc"), NOON), Some(2));
    assert_eq!(found(&set, stating("dev"), NOON), None);
    assert_eq!(found(&set, stating("3.9"), NOON), Some(3));
    assert_eq!(found(&set, stating("3.8.0"), NOON), Some(4));
}

#[test]
fn a_rule_that_this_version_can_not_enforce_refuses_nobody_and_is_kept_as_it_was_written() {
    let written = [
        r#"{"match":{"firmware":">=0"},"effect":"throttle","rate":1.5}"#,
        r#"{"match":{"firmware":">=0"},"effect":"throttle","evict":true}"#,
        r#"{"match":{"firmware":">=0"},"effect":"restrict","evict":true}"#,
        r#"{"match":{"firmware":">=0"},"effect":"restrict","update":7}"#,
        r#"{"match":{"firmware":">=0"},"effect":"explode"}"#,
        r#"{"match":{"firmware":">=0"},"effect":"block","admit_percent":101,"evict":true}"#,
        r#"{"match":{"firmware":">=0"},"effect":"block","mode":"sample"}"#,
        r#"{"match":{"firmware":">=0"},"effect":"block", "update":{"url":"https://example.com/1"}}"#,
        r#"{"match":{"firmware":">=0","site":"a"},"effect":"block"}"#,
        r#"{"match":{"firmware":"≈3.8"},"effect":"block"}"#,
        "not JSON\u{7}",
        "",
    ];
    let known = rule(99, 1, blocks("=9"));
    let read = (1..).zip(written).map(|(id, spec)| {
        Rule::read(RuleId(Uuid::from_u128(id)), spec, NOON, 5).expect_err("this version does not know it")
    });
    let set = RuleSet::compile_stored(5, vec![known], read.collect());

    assert_eq!(found(&set, stating("1"), NOON), None);
    assert_eq!(found(&set, stating("9"), NOON), Some(99));
    assert_eq!(set.evicting(&stating("1"), NOON), None);
    assert!(!set.is_evicting(NOON));
    let kept: Vec<&str> = set.unsupported().iter().map(|rule| &*rule.spec).collect();
    assert_eq!(kept, written);
    assert!(set.unsupported().iter().all(|rule| !rule.problem.is_empty()));
    assert!(
        set.unsupported()
            .iter()
            .all(|rule| !rule.problem.contains(char::is_control))
    );
}

#[test]
fn a_rule_that_goes_past_the_checks_of_the_api_refuses_nobody() {
    let beyond = RuleSpec {
        admit_percent: 101,
        evict: true,
        ..blocks(">=0")
    };

    let set = RuleSet::compile(1, vec![rule(1, 1, beyond)]);

    assert_eq!(found(&set, stating("1"), NOON), None);
    assert_eq!((set.rules().len(), set.unsupported().len()), (0, 1));
}

#[test]
fn devices_are_evicted_for_as_long_as_their_rule_is_in_force() {
    let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
    let rule = rule(1, NOON.as_unix_ms(), blocks(">=1"));
    let short = Rule {
        spec: RuleSpec {
            retry_after: Duration::from_secs(5),
            ..blocks(">=1")
        },
        ..rule.clone()
    };

    assert_eq!(rule.evicted_for(Duration::ZERO), Duration::from_secs(30));
    assert_eq!(rule.evicted_for(minutes(4)), minutes(4));
    assert_eq!(rule.evicted_for(minutes(600)), minutes(15));
    assert_eq!(short.evicted_for(Duration::ZERO), Duration::from_secs(5));
}

#[test]
fn a_rule_that_evicts_is_found_behind_one_that_does_not() {
    let evicting = RuleSpec {
        evict: true,
        expires_at: Some(WallTime::from_unix_ms(2_000_000)),
        ..blocks("3.8.*")
    };
    let set = RuleSet::compile(1, vec![rule(1, 1, blocks(">=0")), rule(2, 2, evicting)]);

    assert_eq!(found(&set, stating("3.8.1"), NOON), Some(1));
    assert_eq!(
        set.evicting(&stating("3.8.1"), NOON).map(|rule| rule.id.0.as_u128()),
        Some(2)
    );
    assert_eq!(set.evicting(&stating("3.9"), NOON), None);
    assert!(set.is_evicting(NOON));
    assert!(!set.is_evicting(WallTime::from_unix_ms(2_000_000)));
}

#[test]
fn a_device_in_the_share_of_a_rule_meets_the_next() {
    let device = |number| DeviceId::from_uuid(Uuid::from_u128(number));
    let with_share = |id, firmware: &str| {
        let spec = RuleSpec {
            admit_percent: 50,
            ..blocks(firmware)
        };
        rule(id, 1, spec)
    };
    let throttle = RuleSpec {
        effect: Effect::Throttle,
        ..blocks(">=3")
    };
    let (first, second, third) = (with_share(1, ">=3.8"), with_share(2, "3.8.*"), rule(3, 1, throttle));
    let rules = vec![first.clone(), second.clone(), third.clone()];
    let set = RuleSet::compile(1, rules);

    for number in 0..100 {
        let subject = Subject {
            device: Some(device(number)),
            ..stating("3.8.1")
        };
        let expected = match (first.admits(device(number)), second.admits(device(number))) {
            (false, _) => Ruling::Block(&first),
            (true, false) => Ruling::Block(&second),
            (true, true) => Ruling::Throttle(&third),
        };
        assert_eq!(set.verdict(&subject, NOON).enforced, Some(expected));
    }
    // A group of devices: the first rule applies to some of them.
    assert_eq!(found(&set, stating("3.8.1"), NOON), Some(1));
}

#[test]
fn a_dry_run_says_what_it_would_do_and_does_nothing() {
    let dry_run = RuleSpec {
        mode: Mode::DryRun,
        evict: true,
        ..blocks(">=3.8")
    };
    let (real, trial) = (rule(1, 1, blocks("=3.8")), rule(2, 1, dry_run));
    let set = RuleSet::compile(1, vec![real.clone(), trial.clone()]);
    let verdict = |firmware| set.verdict(&stating(firmware), NOON);
    let (block, would_block) = (Some(Ruling::Block(&real)), Some(Ruling::Block(&trial)));

    assert_eq!(verdict("3.7"), Verdict::default());
    assert_eq!((verdict("3.8").enforced, verdict("3.8").dry_run), (block, would_block));
    assert_eq!((verdict("3.9").enforced, verdict("3.9").dry_run), (None, would_block));
    assert_eq!(set.evicting(&stating("3.9"), NOON), None);
    assert!(!set.is_evicting(NOON));
}

#[test]
fn a_spec_has_the_documented_defaults() {
    let spec: RuleSpec =
        serde_json::from_value(json!({"match": {"firmware": ">=3.8.0-b3"}, "effect": "block"})).unwrap();

    assert_eq!(spec, blocks(">=3.8.0-b3"));
    assert_eq!(
        serde_json::to_value(&spec).unwrap(),
        json!({"match": {"firmware": ">=3.8.0-b3"}, "effect": "block", "admit_percent": 0, "mode": "enforce", "reason": "",
            "retry_after": "15m", "expires_at": null, "evict": false})
    );
}

#[test]
fn a_spec_survives_being_stored() {
    let spec: RuleSpec = serde_json::from_value(json!({"match": {"firmware": "3.8.*", "model": "cam 2", "tenant": "acme"}, "effect": "throttle",
        "admit_percent": 25, "mode": "dry_run", "reason": "brûlé", "retry_after": "1h 30m", "expires_at": "2026-11-21T06:07:08.009+02:00", "evict": true}))
    .unwrap();

    assert_eq!(spec.retry_after, Duration::from_secs(5400));
    assert_eq!(spec.expires_at, Some(WallTime::from_unix_ms(1_795_234_028_009)));
    let stored = serde_json::to_string(&spec).unwrap();
    assert!(stored.contains("\"2026-11-21T04:07:08.009Z\""), "{stored}");
    assert_eq!(serde_json::from_str::<RuleSpec>(&stored).unwrap(), spec);
}

#[test]
fn a_broken_spec_is_refused_by_name() {
    for (field, value, says) in [
        ("match", json!({"firmware": "3.8"}), "at character 1"),
        ("match", json!({"frimware": "=3.8"}), "unknown field `frimware`"),
        ("match", json!({"model": " "}), "printable ASCII"),
        ("match", json!(null), "invalid type"),
        ("effect", json!("ban"), "unknown variant `ban`"),
        ("retry_after", json!("soon"), "`soon` is not a span of time"),
        ("retry_after", json!(15), "invalid type"),
        ("expires_at", json!("tomorrow"), "`tomorrow` is not a point in time"),
        ("expires_at", json!("2026-13-01T00:00:00Z"), "is not a point in time"),
        ("expires_at", json!("1969-12-31T23:59:59Z"), "is not a point in time"),
        (
            "expires_at",
            json!("2026-11-21T04:07:00\u{e9}"),
            "is not a point in time",
        ),
        ("admit_percent", json!(-1), "invalid value"),
        ("confirmed", json!(true), "unknown field `confirmed`"),
    ] {
        let mut body = json!({"match": {}, "effect": "block"});
        body[field] = value.clone();
        let error = serde_json::from_value::<RuleSpec>(body).unwrap_err().to_string();
        assert!(error.contains(says), "{field}: {value}: {error}");
    }
    for missing in ["match", "effect"] {
        let mut body = json!({"match": {}, "effect": "block"});
        body.as_object_mut().unwrap().remove(missing);
        assert!(
            serde_json::from_value::<RuleSpec>(body)
                .unwrap_err()
                .to_string()
                .contains(missing)
        );
    }
}

#[test]
fn a_spec_that_says_something_wrong_is_refused_by_field() {
    let valid = blocks(">=1");
    assert_eq!(valid.validate(), Ok(()));
    let broken = |change: &dyn Fn(&mut RuleSpec)| {
        let mut spec = valid.clone();
        change(&mut spec);
        let error = spec.validate().unwrap_err();
        (error.field(), error.to_string())
    };

    let update = |text: &str| Some(serde_json::from_str(text).unwrap());
    assert_eq!(broken(&|spec| spec.effect = Effect::Restrict).0, "update");
    assert_eq!(broken(&|spec| spec.update = update("{}")).0, "update");
    let long = format!(r#"{{"a":"{}"}}"#, "x".repeat(RuleSpec::UPDATE_LEN_MAX - 7));
    let nested = |levels: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(levels - 1), "]".repeat(levels - 1));
    let too_deep = nested(RuleSpec::UPDATE_LEVELS_MAX + 1);
    let (field, said) = broken(&|spec| (spec.effect, spec.update) = (Effect::Restrict, update(&too_deep)));
    assert!(field == "update" && said.contains("32 objects"), "{said}");
    let deep = RuleSpec {
        effect: Effect::Restrict,
        update: update(&nested(RuleSpec::UPDATE_LEVELS_MAX)),
        ..valid.clone()
    };
    assert_eq!(deep.validate(), Ok(()));
    let (field, said) = broken(&|spec| (spec.effect, spec.update) = (Effect::Restrict, update(&long)));
    assert!(field == "update" && said.contains("4097 bytes"), "{said}");
    assert_eq!(broken(&|spec| spec.rate_per_second = Some(1)).0, "rate_per_second");
    for rate in [0, RuleSpec::RATE_MAX + 1] {
        let (field, _) = broken(&|spec| (spec.effect, spec.rate_per_second) = (Effect::Throttle, Some(rate)));
        assert_eq!(field, "rate_per_second");
    }
    assert_eq!(
        broken(&|spec| (spec.effect, spec.evict) = (Effect::Throttle, true)).0,
        "evict"
    );
    let devices = |count| (0..count).map(|number| DeviceId::from_uuid(Uuid::from_u128(number)));
    assert_eq!(broken(&|spec| spec.allow = devices(1_001).collect()).0, "allow");
    assert_eq!(
        broken(&|spec| spec.admit_percent = 101).1,
        SpecError::AdmitPercent(101).to_string()
    );
    assert_eq!(broken(&|spec| spec.reason = "a\u{1b}[2J".into()).0, "reason");
    assert_eq!(broken(&|spec| spec.reason = "a".repeat(257)).0, "reason");
    assert_eq!(broken(&|spec| spec.retry_after = Duration::ZERO).0, "retry_after");
    assert_eq!(
        broken(&|spec| spec.retry_after = Duration::from_secs(8 * 86_400)).0,
        "retry_after"
    );
}

#[test]
fn a_preview_counts_devices_by_version() {
    let seen = |firmware, devices| Seen {
        subject: Subject {
            firmware,
            model: Some("cam"),
            ..Subject::default()
        },
        devices,
    };
    let rows = [
        seen(Some("3.8.0-b10"), 4),
        seen(Some("3.8.0-b3"), 2),
        seen(Some("3.7"), 10),
        seen(None, 3),
        seen(Some("3.8.0-b10"), 1),
    ];

    let preview = Preview::of(&blocks(">=3.8.0-b3"), &Beside::default(), rows);

    assert_eq!((preview.total, preview.matched, preview.others), (20, 7, 0));
    let listed: Vec<_> = preview
        .by_version
        .iter()
        .map(|hit| (hit.firmware.as_str(), hit.devices))
        .collect();
    assert_eq!(listed, [("3.8.0-b3", 2), ("3.8.0-b10", 5)]);
    assert!(preview.needs_confirmation());
    assert!(!Preview::of(&blocks(">=3.8.0-b3"), &Beside::default(), rows[..3].iter().copied()).needs_confirmation());
    assert!(!Preview::of(&blocks("=(none)"), &Beside::default(), rows).needs_confirmation());
    assert_eq!(
        Preview::of(&blocks("=(none)"), &Beside::default(), rows).by_version[0].firmware,
        "(none)"
    );
}

#[test]
fn a_change_is_wider_if_it_may_refuse_more() {
    let throttle = |rate_per_second| RuleSpec {
        effect: Effect::Throttle,
        rate_per_second,
        ..blocks("=1")
    };
    let evicting = RuleSpec {
        evict: true,
        ..blocks("=1")
    };
    let trial = RuleSpec {
        mode: Mode::DryRun,
        ..blocks("=1")
    };
    for (before, after, is_wider) in [
        (throttle(Some(10)), throttle(Some(11)), false),
        (throttle(Some(10)), throttle(Some(9)), true),
        (throttle(Some(10)), throttle(None), true),
        (throttle(None), throttle(Some(10)), true),
        (blocks("=1"), throttle(Some(10)), false),
        (throttle(Some(10)), blocks("=1"), true),
        (blocks("=1"), evicting.clone(), true),
        (evicting, blocks("=1"), false),
        (blocks("=1"), blocks("=2"), true),
        (trial.clone(), blocks("=1"), true),
        (blocks("=1"), trial, false),
    ] {
        assert_eq!(after.is_wider_than(&before), is_wider, "{before:?} {after:?}");
    }
}

#[test]
fn a_preview_names_the_tenants_that_lose_all_their_devices() {
    let seen = |tenant, firmware, devices| Seen {
        subject: Subject {
            firmware: Some(firmware),
            tenant: Some(tenant),
            ..Subject::default()
        },
        devices,
    };
    let rows = [
        seen("all", "1", 3),
        seen("all", "1.0", 1),
        seen("some", "1", 9),
        seen("some", "2", 1),
        seen("none", "2", 1),
        seen("away", "1", 0),
    ];
    let few = RuleSpec {
        admit_percent: 50,
        ..blocks("=1")
    };

    let preview = Preview::of(&blocks("=1"), &Beside::default(), rows);

    assert_eq!((preview.dark_tenants, preview.dark), (vec!["all".to_owned()], 1));
    assert_eq!(Preview::of(&few, &Beside::default(), rows).dark, 0);
    let tenants: Vec<String> = (0..100).map(|number| format!("tenant-{number:03}")).collect();
    let many = Preview::of(
        &blocks("=1"),
        &Beside::default(),
        tenants.iter().map(|tenant| seen(tenant, "1", 1)),
    );
    assert_eq!((many.dark_tenants.len(), many.dark), (Preview::TENANTS_MAX, 100));
    assert_eq!(many.dark_tenants[0], "tenant-000");
    let with = |change: fn(&mut RuleSpec)| {
        let mut spec = blocks("=1");
        change(&mut spec);
        let rows = tenants.iter().map(|tenant| seen(tenant, "1", 1));
        Preview::of(&spec, &Beside::default(), rows)
    };
    let tenth = with(|spec| spec.admit_percent = 90);
    assert_eq!(
        (tenth.affected, tenth.added, tenth.together, tenth.dark),
        (10, 10, 10, 0),
        "the sum is rounded, not each group"
    );
    assert!(!tenth.needs_confirmation());
    assert_eq!(with(|spec| spec.admit_percent = 10).dark, 100);
    assert_eq!(with(|spec| spec.effect = Effect::Throttle).dark, 0);
    assert_eq!(with(|spec| spec.mode = Mode::DryRun).dark, 0);
}

#[test]
fn a_preview_counts_the_share_that_is_refused() {
    let seen = |firmware, devices| Seen {
        subject: stating(firmware),
        devices,
    };
    let rows = [seen("1", 50), seen("2", 50)];
    let admitting = |percent| RuleSpec {
        admit_percent: percent,
        ..blocks("=1")
    };
    let of = |spec: &RuleSpec, rules: &[&RuleSpec]| {
        let beside = Beside {
            rules,
            ..Beside::default()
        };
        Preview::of(spec, &beside, rows)
    };

    let shares = [0, 39, 40, 99, 100].map(|percent| {
        let preview = of(&admitting(percent), &[]);
        (preview.matched, preview.affected, preview.needs_confirmation())
    });
    assert_eq!(
        shares,
        [
            (50, 50, true),
            (50, 31, true),
            (50, 30, false),
            (50, 1, false),
            (50, 0, false)
        ]
    );
    // Half of the devices that another rule admits half of.
    let half = admitting(50);
    let together = of(&half, &[&half]);
    assert_eq!((together.affected, together.added, together.together), (25, 13, 38));
    assert!(together.needs_confirmation());
    let trial = RuleSpec {
        mode: Mode::DryRun,
        ..blocks(">=0")
    };
    assert!(trial.is_harmless() && admitting(100).is_harmless() && !admitting(99).is_harmless());
}

#[test]
fn a_preview_lists_the_versions_with_most_devices() {
    let names: Vec<String> = (0..300).map(|number| format!("1.{number}")).collect();
    let rows = names.iter().zip(1..).map(|(name, devices)| Seen {
        subject: stating(name),
        devices,
    });

    let preview = Preview::of(&blocks(">=1"), &Beside::default(), rows);

    assert_eq!(preview.by_version.len(), Preview::VERSIONS_MAX);
    assert_eq!(preview.by_version[0].firmware, "1.200");
    assert_eq!(preview.others, (1..=200).sum::<u64>());
}

#[test]
fn rules_that_nobody_confirmed_are_added_up_with_a_new_one() {
    let cohorts = ["1", "2", "3", "4"].map(|firmware| Seen {
        subject: stating(firmware),
        devices: 25,
    });
    let (first, second) = (blocks("=1"), blocks("=2"));
    let of = |beside: &Beside<'_>, seen: &[Seen<'static>]| Preview::of(&second, beside, seen.iter().copied());
    let beside = |rules, sent_away, unlisted| Beside {
        rules,
        sent_away,
        unlisted,
    };

    assert!(!of(&Beside::default(), &cohorts).needs_confirmation());
    let (firsts, seconds) = ([&first], [&second]);
    let together = of(&beside(&firsts, 0, 0), &cohorts);
    assert_eq!((together.matched, together.added, together.together), (25, 25, 50));
    assert!(together.needs_confirmation());
    // The first has already closed its sessions.
    let gone = of(&beside(&firsts, 25, 0), &cohorts[1..]);
    assert_eq!((gone.total, gone.together), (100, 50));
    assert!(gone.needs_confirmation());
    // It affects no device that the first does not.
    assert!(!of(&beside(&seconds, 0, 0), &cohorts).needs_confirmation());
    // Devices that are not listed are counted as affected.
    assert!(of(&beside(&[], 0, 20), &cohorts).needs_confirmation());
}

#[test]
fn a_preview_of_a_tenth_of_the_registered_devices_stands_for_all() {
    let of = |devices| {
        let seen = Seen {
            subject: stating("1"),
            devices,
        };
        Preview::of(&blocks("=2"), &Beside::default(), [seen])
    };

    assert!(of(0).is_blind(20));
    assert!(of(9).is_blind(100));
    assert!(!of(10).is_blind(100));
    assert!(!of(0).is_blind(19));
}

/// The rule that applies, found by checking each.
fn naive<'r>(
    rules: &'r [Rule],
    is_in: impl Fn(&RuleSpec) -> bool,
    subject: &Subject<'_>,
    wall: WallTime,
) -> Option<&'r Rule> {
    let lasts_until = |rule: &Rule| rule.spec.expires_at.map_or(u64::MAX, WallTime::as_unix_ms);
    let is_let_through = |rule: &Rule| {
        let is_allowed = |device| rule.spec.allow.iter().any(|allowed| *allowed == device);
        rule.spec.admit_percent == 100
            || subject
                .device
                .is_some_and(|device| is_allowed(device) || rule.admits(device))
    };
    rules
        .iter()
        .filter(|rule| {
            is_in(&rule.spec) && !rule.is_expired(wall) && rule.spec.is_for(subject) && !is_let_through(rule)
        })
        .min_by_key(|rule| {
            (
                rule.spec.effect,
                std::cmp::Reverse(lasts_until(rule)),
                rule.created_at,
                rule.id,
            )
        })
}

const FIRMWARE: [&str; 22] = [
    "",
    "main",
    "MAIN+1",
    "dev",
    "(none)",
    "0",
    "3.8.0-dev",
    "3.8.0-b2",
    "v3.8.0-b3",
    "3.8.0-b10",
    "3.8~rc1",
    "3.8",
    "3.8.0+x",
    "3.8.0-1",
    "3.8.0d",
    "3.8.1-b1",
    "3.8.1",
    "3.9-dev",
    "3.9",
    "3.10",
    "2025-11-02",
    "20251102",
];

fn ranges() -> impl Strategy<Value = String> {
    let operator = prop::sample::select(vec!["=", "!=", "<", "<=", ">", ">="]);
    let numbered = prop::sample::select(FIRMWARE[5..].to_vec());
    let condition = prop_oneof![
        6 => (operator, numbered).prop_map(|(operator, version)| format!("{operator}{version}")),
        2 => prop::sample::select(vec!["3.8.*", "!=3.8.*", "3.*", "!=3.9.*", "=main", "=DEV", "=(none)", "!=dev"]).prop_map(str::to_owned),
    ];
    prop::collection::vec(condition, 1..4).prop_map(|conditions| conditions.join(","))
}

fn names() -> impl Strategy<Value = Option<&'static str>> {
    prop::sample::select(vec![None, None, Some("a"), Some("b")])
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let effect = prop::sample::select(vec![Effect::Block, Effect::Restrict, Effect::Throttle]);
    let expiry = prop_oneof![2 => Just(None), 3 => (0_u64..6).prop_map(Some)];
    let share = prop_oneof![3 => Just(0), 3 => 1_u8..100, 1 => Just(100)];
    let mode = prop_oneof![3 => Just(Mode::Enforce), 1 => Just(Mode::DryRun)];
    (
        (any::<u8>(), 0_u64..4),
        prop::option::weighted(0.8, ranges()),
        names(),
        names(),
        effect,
        expiry,
        share,
        mode,
        (any::<bool>(), prop_oneof![4 => Just(0), 1 => 1_u128..8]),
    )
        .prop_map(
            |((id, created), firmware, model, tenant, effect, expires, admit_percent, mode, (evict, allowed))| {
                let matches = Match {
                    firmware: firmware.map(|text| text.parse().unwrap()),
                    model: model.map(label),
                    tenant: tenant.map(label),
                };
                let spec = RuleSpec {
                    admit_percent,
                    mode,
                    expires_at: expires.map(WallTime::from_unix_ms),
                    evict: evict && effect != Effect::Throttle,
                    update: (effect == Effect::Restrict).then(Default::default),
                    allow: (0..allowed)
                        .map(|number| DeviceId::from_uuid(Uuid::from_u128(number)))
                        .collect(),
                    ..RuleSpec::new(matches, effect)
                };
                rule(u128::from(id), created, spec)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_compiled_set_says_what_its_rules_say(
        mut rules in prop::collection::vec(any_rule(), 0..24),
        model in names(),
        tenant in names(),
        wall_ms in 0_u64..7,
        device in prop::option::weighted(0.9, prop_oneof![any::<u128>(), 0_u128..8]),
    ) {
        rules.sort_by_key(|rule| rule.id);
        rules.dedup_by_key(|rule| rule.id);
        let set = RuleSet::compile(1, rules.clone());
        prop_assert_eq!(set.unsupported().len(), 0);
        let is_enforced = |spec: &RuleSpec| spec.mode == Mode::Enforce;
        let device = device.map(|number| DeviceId::from_uuid(Uuid::from_u128(number)));
        let wall = WallTime::from_unix_ms(wall_ms);
        let firmware = FIRMWARE.iter().map(|text| Some(*text)).chain([None]);

        for firmware in firmware {
            let subject = Subject { device, firmware, model, tenant };
            let Verdict { enforced, dry_run } = set.verdict(&subject, wall);
            prop_assert_eq!(enforced.map(Ruling::rule), naive(&rules, is_enforced, &subject, wall));
            prop_assert_eq!(dry_run.map(Ruling::rule), naive(&rules, |spec| !is_enforced(spec), &subject, wall));
            let evicting = |spec: &RuleSpec| is_enforced(spec) && spec.evict;
            prop_assert_eq!(set.evicting(&subject, wall), naive(&rules, evicting, &subject, wall));
        }
    }
}
