//! Rule sets against a matcher that looks at every rule, specs as they are written, previews.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;

use super::{Beside, Effect, Match, Mode, Preview, Rule, RuleSet, RuleSpec, Seen, SpecError, Subject};
use crate::{
    id::{Label, RuleId},
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
    set.evaluate(&subject, wall).map(|rule| rule.id.0.as_u128())
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
        r#"{"match":{"firmware":">=0"},"effect":"throttle","evict":true}"#,
        r#"{"match":{"firmware":">=0"},"effect":"restrict","evict":true}"#,
        r#"{"match":{"firmware":">=0"},"effect":"explode"}"#,
        r#"{"match":{"firmware":">=0"},"effect":"block","admit_percent":90,"evict":true}"#,
        r#"{"match":{"firmware":">=0"},"effect":"block","mode":"dry_run","evict":true}"#,
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
        admit_percent: 90,
        evict: true,
        ..blocks(">=0")
    };

    let set = RuleSet::compile(1, vec![rule(1, 1, beyond)]);

    assert_eq!(found(&set, stating("1"), NOON), None);
    assert_eq!((set.rules().len(), set.unsupported().len()), (0, 1));
}

#[test]
fn an_older_version_has_the_digest_of_a_newer_one() {
    let known = blocks(">=1");
    let digest = |spec: &str| match Rule::read(RuleId(Uuid::from_u128(1)), spec, NOON, 5) {
        Ok(rule) => RuleSet::compile(5, vec![rule]).digest(),
        Err(unsupported) => RuleSet::compile_stored(5, Vec::new(), vec![unsupported]).digest(),
    };

    // A later version writes its new field only where it says something; this one hashes the rule as it is stored.
    let later = r#"{"effect":"block","match":{"firmware":">=1"},"update":1}"#;
    let other = r#"{"effect":"block","match":{"firmware":">=1"},"update":2}"#;
    let with_defaults = r#"{"admit_percent":0,"effect":"block","evict":false,"expires_at":null,"match":{"firmware":">=1"},"mode":"enforce","reason":"","retry_after":"15m","update":1}"#;

    assert_eq!(digest(later), digest(with_defaults));
    assert_ne!(digest(later), digest(other));
    assert_eq!(
        digest(r#"{"effect":"block","match":{"firmware":">=1"}}"#),
        RuleSet::compile(
            5,
            vec![Rule {
                revision: 5,
                ..rule(1, NOON.as_unix_ms(), known)
            }]
        )
        .digest()
    );
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
fn the_digest_tells_what_rules_say_in_whatever_order_they_come() {
    let (first, second) = (rule(1, 1, blocks(">=1")), rule(2, 2, blocks(">=2")));
    let set = RuleSet::compile(1, vec![first.clone(), second.clone()]);

    assert_eq!(
        set.digest(),
        RuleSet::compile(9, vec![second.clone(), first.clone()]).digest()
    );
    assert_ne!(set.digest(), RuleSet::compile(1, vec![first.clone()]).digest());
    assert_ne!(
        set.digest(),
        RuleSet::compile(1, vec![first, rule(2, 2, blocks(">=3"))]).digest()
    );
    assert_eq!(RuleSet::empty().digest_hex(), "e3b0c44298fc1c149afbf4c8996fb924");
    assert_eq!(set.digest_hex(), PINNED_DIGEST);
}

/// All processes and versions must agree on it: nodes compare digests.
const PINNED_DIGEST: &str = "c4dec832ba05f54e6ad7a0c7cd4ab444";

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
        ("retry_after", json!("soon"), "`soon` is no span of time"),
        ("retry_after", json!(15), "invalid type"),
        ("expires_at", json!("tomorrow"), "`tomorrow` is no point in time"),
        ("expires_at", json!("2026-13-01T00:00:00Z"), "is no point in time"),
        ("expires_at", json!("1969-12-31T23:59:59Z"), "is no point in time"),
        ("expires_at", json!("2026-11-21T04:07:00\u{e9}"), "is no point in time"),
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
fn what_later_versions_bring_is_refused_in_words() {
    let valid = blocks(">=1");
    assert_eq!(valid.validate(), Ok(()));
    let broken = |change: &dyn Fn(&mut RuleSpec)| {
        let mut spec = valid.clone();
        change(&mut spec);
        let error = spec.validate().unwrap_err();
        (error.field(), error.to_string())
    };

    for effect in [Effect::Restrict, Effect::Throttle] {
        let (field, said) = broken(&|spec| spec.effect = effect);
        assert_eq!(
            (field, said),
            (
                "effect",
                format!(
                    "effect `{}` is not available in this version; use `block`",
                    effect.as_str()
                )
            )
        );
    }
    let (field, said) = broken(&|spec| spec.mode = Mode::DryRun);
    assert!(
        field == "mode" && said.contains("not available in this version"),
        "{said}"
    );
    let (field, said) = broken(&|spec| spec.admit_percent = 5);
    assert!(
        field == "admit_percent" && said.contains("not available in this version"),
        "{said}"
    );
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
            tenant: None,
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
    // The first has closed its sessions already.
    let gone = of(&beside(&firsts, 25, 0), &cohorts[1..]);
    assert_eq!((gone.total, gone.together), (100, 50));
    assert!(gone.needs_confirmation());
    // It hits nobody that the first does not.
    assert!(!of(&beside(&seconds, 0, 0), &cohorts).needs_confirmation());
    // Whom nobody can tell apart counts as hit.
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

/// The rule that counts, found by looking at each.
fn naive<'r>(rules: &'r [Rule], subject: &Subject<'_>, wall: WallTime) -> Option<&'r Rule> {
    let lasts_until = |rule: &Rule| rule.spec.expires_at.map_or(u64::MAX, WallTime::as_unix_ms);
    rules
        .iter()
        .filter(|rule| rule.spec.validate().is_ok() && !rule.is_expired(wall) && rule.spec.is_for(subject))
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
    (
        any::<u8>(),
        0_u64..4,
        prop::option::weighted(0.8, ranges()),
        names(),
        names(),
        effect,
        expiry,
        0_u8..8,
        any::<bool>(),
    )
        .prop_map(|(id, created, firmware, model, tenant, effect, expires, mode, evict)| {
            let matches = Match {
                firmware: firmware.map(|text| text.parse().unwrap()),
                model: model.map(label),
                tenant: tenant.map(label),
            };
            let spec = RuleSpec {
                mode: if mode == 0 { Mode::DryRun } else { Mode::Enforce },
                expires_at: expires.map(WallTime::from_unix_ms),
                evict,
                ..RuleSpec::new(matches, effect)
            };
            rule(u128::from(id), created, spec)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn a_compiled_set_says_what_its_rules_say(
        mut rules in prop::collection::vec(any_rule(), 0..24),
        model in names(),
        tenant in names(),
        wall_ms in 0_u64..7,
    ) {
        rules.sort_by_key(|rule| rule.id);
        rules.dedup_by_key(|rule| rule.id);
        let set = RuleSet::compile(1, rules.clone());
        let evicting: Vec<Rule> = rules.iter().filter(|rule| rule.spec.evict).cloned().collect();
        let wall = WallTime::from_unix_ms(wall_ms);
        let firmware = FIRMWARE.iter().map(|text| Some(*text)).chain([None]);

        for firmware in firmware {
            let subject = Subject { firmware, model, tenant };
            prop_assert_eq!(set.evaluate(&subject, wall), naive(&rules, &subject, wall));
            prop_assert_eq!(set.evicting(&subject, wall), naive(&evicting, &subject, wall));
        }
    }
}
