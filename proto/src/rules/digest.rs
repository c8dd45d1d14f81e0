//! Digest of a rule set: equal on all nodes that hold the same rules, whatever their versions and the order in which
//! they received the rules.
//!
//! The digest covers a canonical encoding of the rules, not their JSON. A rule is its id, its time of creation, and its
//! fields by name. A field with its default value is left out, so a later version's new field changes the digest of
//! only those rules that use it. Values are canonical JSON, except times and spans, which can be written in several
//! ways. A field that a later version adds must be encoded as JSON, because earlier versions encode it so without
//! knowing it. Another encoding needs another [`FORM`].

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Match, Rule, RuleSpec, Unsupported};
use crate::{
    id::{Label, RuleId},
    time::WallTime,
};

/// Number of the encoding.
const FORM: u8 = 2;
/// Kind of a value in canonical JSON.
const JSON: u8 = 0;
/// Kind of a time (milliseconds of the Unix epoch in 8 bytes) or a span (nanoseconds in 16 bytes).
const TIME: u8 = 1;
/// Kind of a rule that is not a JSON object: its text as it is stored.
const TEXT: u8 = 2;

/// The name of a field, and its kind and value.
type Fields = BTreeMap<String, (u8, Vec<u8>)>;

pub(super) fn digest(rules: &[Rule], unsupported: &[Unsupported]) -> [u8; 16] {
    let known = rules
        .iter()
        .map(|rule| (rule.id, rule.created_at, known_fields(&rule.spec)));
    let stored = unsupported
        .iter()
        .map(|rule| (rule.id, rule.created_at, stored_fields(&rule.spec)));
    let mut all: Vec<(RuleId, WallTime, Fields)> = known.chain(stored).collect();
    all.sort();
    let mut hash = Sha256::new_with_prefix([FORM]);
    for (id, created_at, fields) in all {
        hash.update(id.0.as_bytes());
        hash.update(created_at.as_unix_ms().to_be_bytes());
        hash.update(len(fields.len()));
        for (name, (kind, value)) in fields {
            hash.update(len(name.len()));
            hash.update(name);
            hash.update([kind]);
            hash.update(len(value.len()));
            hash.update(value);
        }
    }
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.finalize()[..16]);
    digest
}

fn len(len: usize) -> [u8; 4] {
    u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()
}

/// The fields of a rule that this version knows, without those with default values.
fn known_fields(spec: &RuleSpec) -> Fields {
    let RuleSpec {
        matches,
        effect,
        admit_percent,
        mode,
        reason,
        retry_after,
        expires_at,
        evict,
        update,
        rate_per_second,
        allow,
    } = spec;
    let default = RuleSpec::new(Match::default(), *effect);
    let json = |value: Value| (JSON, value.to_string().into_bytes());
    let label = |label: &Option<Label>| label.as_deref().map(|text| json(text.into()));
    let fields = [
        (
            "match.firmware",
            matches.firmware.as_ref().map(|range| json(range.as_str().into())),
        ),
        ("match.model", label(&matches.model)),
        ("match.tenant", label(&matches.tenant)),
        ("effect", Some(json(effect.as_str().into()))),
        (
            "admit_percent",
            (*admit_percent != default.admit_percent).then(|| json((*admit_percent).into())),
        ),
        ("mode", (*mode != default.mode).then(|| json(mode.as_str().into()))),
        (
            "reason",
            (*reason != default.reason).then(|| json(reason.as_str().into())),
        ),
        (
            "retry_after",
            (*retry_after != default.retry_after).then(|| (TIME, retry_after.as_nanos().to_be_bytes().into())),
        ),
        (
            "expires_at",
            expires_at.map(|at| (TIME, at.as_unix_ms().to_be_bytes().into())),
        ),
        ("evict", evict.then(|| json(true.into()))),
        (
            "update",
            update
                .as_ref()
                .map(|update| (JSON, canonical(&Value::Object((**update).clone())))),
        ),
        ("rate_per_second", rate_per_second.map(|rate| json(rate.into()))),
        ("allow", (!allow.is_empty()).then(|| json(json!(allow)))),
    ];
    let given = fields
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    given.collect()
}

/// The fields of a stored rule.
fn stored_fields(spec: &str) -> Fields {
    let Ok(Value::Object(stored)) = serde_json::from_str(spec) else {
        return Fields::from([(String::new(), (TEXT, spec.as_bytes().to_vec()))]);
    };
    let mut fields = Fields::new();
    let mut add = |name: String, value: &Value, alone: Value| match serde_json::from_value::<RuleSpec>(alone) {
        // The field as this version reads it: nothing if it has its default value.
        Ok(spec) => fields.extend(known_fields(&spec).remove_entry(&name)),
        Err(_) => {
            fields.insert(name, (JSON, canonical(value)));
        }
    };
    for (name, value) in &stored {
        match value.as_object().filter(|_| name == "match") {
            Some(conditions) => {
                for (condition, value) in conditions {
                    let alone = json!({"match": {condition: value}, "effect": "block"});
                    add(format!("match.{condition}"), value, alone);
                }
            }
            None => {
                let mut alone = json!({"match": {}, "effect": "block"});
                alone[name] = value.clone();
                add(name.clone(), value, alone);
            }
        }
    }
    fields
}

/// Without white space, with the keys of objects sorted.
fn canonical(value: &Value) -> Vec<u8> {
    let mut text = String::new();
    write_canonical(value, &mut text);
    text.into()
}

fn write_canonical(value: &Value, text: &mut String) {
    match value {
        Value::Array(items) => {
            for (item, before) in items.iter().zip(std::iter::once("[").chain(std::iter::repeat(","))) {
                text.push_str(before);
                write_canonical(item, text);
            }
            text.push_str(if items.is_empty() { "[]" } else { "]" });
        }
        Value::Object(fields) => {
            let sorted: BTreeMap<&String, &Value> = fields.iter().collect();
            let is_empty = sorted.is_empty();
            for ((name, value), before) in sorted
                .into_iter()
                .zip(std::iter::once("{").chain(std::iter::repeat(",")))
            {
                text.push_str(before);
                text.push_str(&Value::from(name.as_str()).to_string());
                text.push(':');
                write_canonical(value, text);
            }
            text.push_str(if is_empty { "{}" } else { "}" });
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => text.push_str(&value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::rules::RuleSet;

    const NOON: WallTime = WallTime::from_unix_ms(1_000_000);

    /// Reads stored rules, with the ids 1, 2, 3 …
    fn set<'a>(specs: impl IntoIterator<Item = &'a str>) -> RuleSet {
        let read = (1..)
            .zip(specs)
            .map(|(id, spec)| Rule::read(RuleId(Uuid::from_u128(id)), spec, NOON, 5));
        let (mut rules, mut unsupported) = (Vec::new(), Vec::new());
        for rule in read {
            match rule {
                Ok(rule) => rules.push(rule),
                Err(other) => unsupported.push(other),
            }
        }
        RuleSet::compile_stored(5, rules, unsupported)
    }

    fn of(spec: &str) -> String {
        set([spec]).digest_hex()
    }

    /// Nodes of several versions compare digests: these never change unless [`FORM`] does.
    #[test]
    fn digests_are_the_same_in_all_versions() {
        let all = r#"{"match":{"firmware":">=3.8.0-b3,<3.9","model":"cam 2","tenant":"acme"},"effect":"throttle","admit_percent":25,
            "mode":"dry_run","reason":"br\u00fbl\u00e9 \"x\"","retry_after":"1h 30m","expires_at":"2026-11-21T04:07:08.009Z","evict":true}"#;
        let later = r#"{"effect":"explode","match":{"firmware":">=1","site":{"z":[1,2.5,null],"a":{}}},"update":{"url":"x","b":[]}}"#;

        assert_eq!(set([]).digest_hex(), "dbc1b4c900ffe48d575b5da5c6380401");
        assert_eq!(
            of(r#"{"match":{"firmware":">=1"},"effect":"block"}"#),
            "be206a8db4166d845ec89f99d072437e"
        );
        assert_eq!(of(all), "ca8a64fb7c91a8e4dc2ed8e33bde8797");
        assert_eq!(of(later), "d53ddd40263e0104b05d2cb33dffb453");
        assert_eq!(of("not JSON"), "a0901a445f73a1550587cd6be4ccc35c");
        assert_eq!(
            set([all, later, "not JSON", r#"{"match":{},"effect":"block"}"#]).digest_hex(),
            "cbf0a28eeb69fca24bb19c40d33c89c3"
        );
    }

    #[test]
    fn a_field_that_has_its_default_is_no_part_of_the_digest() {
        let short = r#"{"match":{"firmware":">=1"},"effect":"block"}"#;
        let long = r#"{"admit_percent":0,"effect":"block","evict":false,"expires_at":null,"match":{"firmware":">=1"},"mode":"enforce","reason":"","retry_after":"15m"}"#;

        assert_eq!(of(short), of(long));
        // The same for a rule that this version does not know.
        let later = |spec: &str| of(&spec.replacen('{', r#"{"update":1,"#, 1));
        assert_eq!(later(short), later(long));
        assert_ne!(later(short), of(short));
        assert_ne!(later(short), of(&short.replacen('{', r#"{"update":2,"#, 1)));
    }

    #[test]
    fn what_is_written_differently_and_means_the_same_has_one_digest() {
        for (left, right) in [
            (r#""retry_after":"90m""#, r#""retry_after":"1h 30m""#),
            (
                r#""expires_at":"2026-11-21T06:07:08+02:00""#,
                r#""expires_at":"2026-11-21T04:07:08.000Z""#,
            ),
            (r#""update":{"a":1,"b":2}"#, r#""update": { "b": 2, "a": 1 }"#),
            (
                r#""allow":["00000000-0000-0000-0000-0000000000aa","00000000-0000-0000-0000-0000000000bb"]"#,
                r#""allow":["000000000000000000000000000000BB","00000000-0000-0000-0000-0000000000AA","000000000000000000000000000000bb"]"#,
            ),
        ] {
            let with = |field: &str| of(&format!(r#"{{"match":{{}},"effect":"restrict",{field}}}"#));
            let later = |field: &str| with(&format!(r#"{field},"later":true"#));
            assert_eq!(with(left), with(right));
            assert_eq!(later(left), later(right));
        }
    }

    #[test]
    fn every_field_changes_the_digest() {
        let fields = [
            r#""match":{"firmware":"=1"},"effect":"block""#,
            r#""match":{"model":"=1"},"effect":"block""#,
            r#""match":{"tenant":"=1"},"effect":"block""#,
            r#""match":{},"effect":"block""#,
            r#""match":{},"effect":"restrict""#,
            r#""match":{},"effect":"block","admit_percent":1"#,
            r#""match":{},"effect":"block","mode":"dry_run""#,
            r#""match":{},"effect":"block","reason":"a""#,
            r#""match":{},"effect":"block","retry_after":"1m""#,
            r#""match":{},"effect":"block","expires_at":"2026-11-21T04:07:08Z""#,
            r#""match":{},"effect":"block","evict":true"#,
            r#""match":{},"effect":"restrict","update":{"a":1}"#,
            r#""match":{},"effect":"throttle","rate_per_second":5"#,
            r#""match":{},"effect":"throttle","rate_per_second":6"#,
            r#""match":{},"effect":"throttle""#,
            r#""match":{},"effect":"block","allow":["00000000-0000-0000-0000-000000000001"]"#,
            r#""match":{},"effect":"block","allow":["00000000-0000-0000-0000-000000000002"]"#,
            r#""match":{},"effect":"restrict","update":{"a":{"c":1,"b":2}}"#,
        ];
        let digests: std::collections::BTreeSet<String> =
            fields.iter().map(|fields| of(&format!("{{{fields}}}"))).collect();

        assert_eq!(digests.len(), fields.len());
    }

    proptest! {
        #[test]
        fn the_order_in_which_rules_come_does_not_count(
            specs in prop::collection::vec(prop::sample::select(vec![
                r#"{"match":{"firmware":">=1"},"effect":"block"}"#,
                r#"{"match":{"firmware":"=2"},"effect":"throttle"}"#,
                r#"{"match":{"model":"a"},"effect":"block","evict":true}"#,
                "not JSON",
            ]), 0..8),
            seed in any::<u64>(),
        ) {
            let set = set(specs);
            let (mut rules, mut unsupported) = (set.rules().to_vec(), set.unsupported().to_vec());
            let shuffled = |id: RuleId| (id.0.as_u128() as u64).wrapping_mul(seed | 1);
            rules.sort_by_key(|rule| shuffled(rule.id));
            unsupported.sort_by_key(|rule| shuffled(rule.id));

            prop_assert_eq!(RuleSet::compile_stored(9, rules, unsupported).digest(), set.digest());
        }
    }
}
