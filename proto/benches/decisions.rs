//! Time of decisions: `cargo bench -p seawall-proto`.

mod cases;

use std::hint::black_box;

use cases::{ConnectPath, KEYS, Node, RULES, VERSIONS};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use seawall_proto::firmware::compare;

fn handshake(criterion: &mut Criterion) {
    let mut path = ConnectPath::new();
    let mut group = criterion.benchmark_group("handshake");
    group.bench_function("parse", |bencher| bencher.iter(|| path.parse()));
    group.bench_function("admit", |bencher| bencher.iter(|| path.admit()));
    group.bench_function("resume", |bencher| bencher.iter(|| path.resume()));
    group.bench_function("refuse", |bencher| bencher.iter(|| path.refuse()));
    group.finish();
}

fn rules(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rules");
    for count in [10, RULES, 10 * RULES] {
        let set = cases::rules(count);
        let hit = format!("v3.{}.0-b10", count / 3 + 10);
        for (name, firmware) in [
            ("hit", hit.as_str()),
            ("miss", "v3.7.9-b10+build5"),
            ("no digit", "main"),
        ] {
            group.bench_with_input(BenchmarkId::new(name, count), firmware, |bencher, firmware| {
                bencher.iter(|| cases::verdict(&set, firmware));
            });
        }
        let shares = cases::rules_with_shares(count);
        group.bench_with_input(BenchmarkId::new("share", count), hit.as_str(), |bencher, firmware| {
            bencher.iter(|| cases::verdict(&shares, firmware));
        });
        group.sample_size(10);
        group.bench_function(BenchmarkId::new("compile", count), |bencher| {
            bencher.iter(|| cases::rules(count));
        });
        group.sample_size(100);
    }
    group.finish();
}

fn versions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("versions");
    for (left, right) in VERSIONS {
        group.bench_function(BenchmarkId::new(left, right), |bencher| {
            bencher.iter(|| compare(black_box(left), black_box(right)));
        });
    }
    let range = cases::range();
    group.bench_function("range", |bencher| {
        bencher.iter(|| range.matches(black_box(Some("3.8.0-b10"))));
    });
    group.finish();
}

fn tokens(criterion: &mut Criterion) {
    let path = ConnectPath::new();
    criterion.bench_function("resume/mint", |bencher| bencher.iter(|| path.mint()));
    criterion.bench_function("resume/verify", |bencher| bencher.iter(|| path.verify()));
    let (mut giver, mut taker) = (Node::new(), Node::new());
    let token = giver.give_slot();
    criterion.bench_function("slots/give", |bencher| bencher.iter(|| giver.give_slot()));
    criterion.bench_function("slots/show", |bencher| {
        bencher.iter(|| taker.show_slot(black_box(&token)))
    });
}

fn look_ups(criterion: &mut Criterion) {
    let mut node = Node::new();
    let mut group = criterion.benchmark_group("admission");
    group.throughput(Throughput::Elements(KEYS as u64));
    group.bench_function("look-up", |bencher| bencher.iter(|| node.look_up()));
    group.finish();
}

fn frames(criterion: &mut Criterion) {
    criterion.bench_function("frames/read", |bencher| bencher.iter(cases::read_frame));
    criterion.bench_function("frames/write", |bencher| bencher.iter(cases::write_frame));
}

criterion_group!(decisions, handshake, rules, versions, tokens, look_ups, frames);
criterion_main!(decisions);
