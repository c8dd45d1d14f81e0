//! What one decision costs: `cargo bench -p seawall-proto`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use seawall_proto::{
    firmware::compare,
    id::{DeviceId, Label, RuleId, SecretHash, SessionId},
    resume::{Generation, Grant, Judge, LIFE, ResumeKeys, Revoked},
    rules::{Effect, Match, Rule, RuleSet, RuleSpec, Subject},
    time::WallTime,
};
use uuid::Uuid;

fn rule(number: u32) -> Rule {
    let firmware = format!(">=3.{number}.0-b3,<3.{number}.9").parse().expect("a range");
    let matches = Match {
        firmware: Some(firmware),
        ..Match::default()
    };
    Rule {
        id: RuleId(Uuid::from_u128(u128::from(number))),
        spec: RuleSpec::new(matches, Effect::Block),
        created_at: WallTime::from_unix_ms(u64::from(number)),
        revision: 1,
    }
}

fn rules(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rules");
    for count in [10, 1_000, 10_000] {
        let set = RuleSet::compile(1, (0..count).map(rule).collect());
        let hit = format!("v3.{}.0-b10", count / 3);
        for (name, firmware) in [
            ("hit", hit.as_str()),
            ("miss", "v3.7.9-b10+build5"),
            ("no digit", "main"),
        ] {
            let subject = Subject {
                firmware: Some(firmware),
                model: Some("camera"),
                tenant: Some("acme"),
            };
            group.bench_with_input(BenchmarkId::new(name, count), &subject, |bencher, subject| {
                bencher.iter(|| set.evaluate(black_box(subject), WallTime::from_unix_ms(5)));
            });
        }
        group.sample_size(10);
        group.bench_function(BenchmarkId::new("compile", count), |bencher| {
            bencher.iter(|| RuleSet::compile(1, (0..count).map(rule).collect()));
        });
        group.sample_size(100);
    }
    group.finish();
}

fn versions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compare");
    for (left, right) in [
        ("3.8.0-b3", "3.8.0-b10"),
        ("FW_1.2.9", "FW_1.2.10"),
        ("v5.1.2-25-g0123abc-dirty", "v5.1.2-105-gfedcba9-dirty"),
        ("2025-11-02", "2025-11-10"),
    ] {
        group.bench_function(BenchmarkId::new(left, right), |bencher| {
            bencher.iter(|| compare(black_box(left), black_box(right)));
        });
    }
    group.finish();
}

fn resume(criterion: &mut Criterion) {
    let grant = Grant {
        device: DeviceId::from_uuid(Uuid::from_u128(7)),
        credential: SecretHash::of(b"the secret").into(),
        tenant: Label::parse("default").ok().flatten().expect("a label"),
        model: None,
        generation: Generation(0),
        credential_until: None,
    };
    let (keys, wall) = (ResumeKeys::new(1, [1; 32]), WallTime::from_unix_ms(1_800_000_000_000));
    let revoked = Revoked::of(
        Generation(60_000),
        Generation(0),
        (1..=60_000).map(|n| (DeviceId::from_uuid(Uuid::from_u128(u128::from(n) << 64)), Generation(n))),
    );
    let judge = Judge {
        keys: &keys,
        revoked: &revoked,
        is_stale: false,
    };
    let mint = || grant.mint(&keys, SessionId(1), LIFE, wall).expect("a token");
    let token = mint().text;
    criterion.bench_function("resume/mint", |bencher| bencher.iter(mint));
    criterion.bench_function("resume/weigh", |bencher| {
        bencher.iter(|| judge.weigh(grant.device, &grant.credential, black_box(&token), wall));
    });
}

criterion_group!(decisions, rules, versions, resume);
criterion_main!(decisions);
