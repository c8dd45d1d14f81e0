//! What a decision by many firmware rules takes.

use std::{hint::black_box, time::Instant};

use seawall_proto::{
    id::{DeviceId, Label, RuleId},
    rules::{Effect, Match, Rule, RuleSet, RuleSpec, Subject},
    time::WallTime,
};
use uuid::Uuid;

const RULES: u32 = 10_000;
const DECISIONS: u32 = 20_000;

fn rule(number: u32) -> Rule {
    let name = |text: &str| Label::parse(text).unwrap();
    let matches = Match {
        firmware: Some(
            format!(">=3.{number}.0-b3,<3.{number}.9,!=3.{number}.1")
                .parse()
                .unwrap(),
        ),
        model: name("camera").filter(|_| number.is_multiple_of(3)),
        tenant: name("acme").filter(|_| number.is_multiple_of(2)),
    };
    Rule {
        id: RuleId(Uuid::from_u128(u128::from(number))),
        spec: RuleSpec {
            admit_percent: (number % 101) as u8,
            ..RuleSpec::new(matches, Effect::Block)
        },
        created_at: WallTime::from_unix_ms(u64::from(number)),
        revision: 1,
    }
}

/// The fastest of ten batches, each of many versions: other programs of the machine may hold up some.
#[test]
#[cfg_attr(debug_assertions, ignore = "an unoptimised decision says nothing")]
fn a_decision_by_ten_thousand_rules_takes_under_a_microsecond() {
    let rules = RuleSet::compile(1, (0..RULES).map(rule).collect());
    let versions: Vec<String> = (0..DECISIONS)
        .map(|n| format!("v3.{}.{}-b10", n % RULES, n % 10))
        .collect();
    let mut refused = 0;

    let batches = (0..10).map(|_| {
        let begun = Instant::now();
        for (number, firmware) in versions.iter().enumerate() {
            let subject = Subject {
                device: Some(DeviceId::from_uuid(Uuid::from_u128(number as u128 * 7_919))),
                firmware: Some(firmware),
                model: Some("camera"),
                tenant: Some("acme"),
            };
            let verdict = rules.verdict(black_box(&subject), WallTime::from_unix_ms(5));
            refused += u32::from(verdict.enforced.is_some());
        }
        begun.elapsed() / DECISIONS
    });
    let fastest = batches.min().unwrap();

    println!("{fastest:?} a decision, {refused} refused");
    assert!(refused > DECISIONS, "most rules refuse some: {refused}");
    assert!(fastest.as_nanos() < 1_000, "{fastest:?}");
}
