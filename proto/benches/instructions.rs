//! Cost of decisions in instructions, which other load on the machine does not change. CONTRIBUTING.md says how to run
//! it. A bound is a fifth above the count at the time when it was set. A change that needs a higher one says why.

mod cases;

use std::hint::black_box;

use cases::{ConnectPath, Node};
use gungraun::{Callgrind, EventKind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main};
use seawall_proto::{
    firmware::{Range, compare},
    rules::RuleSet,
};

fn at_most(instructions: u64) -> LibraryBenchmarkConfig {
    let mut callgrind = Callgrind::with_args(["--cache-sim=no"]);
    callgrind.hard_limits([(EventKind::Ir, instructions)]);
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(callgrind);
    config
}

/// Leaks the value, so that dropping it is not part of the measurement.
fn kept<T>(of: T) -> &'static mut T {
    Box::leak(Box::new(of))
}

fn path() -> &'static mut ConnectPath {
    kept(ConnectPath::new())
}

/// A path that was used before, so that one-time initialisation is done.
fn warm_path() -> &'static mut ConnectPath {
    let path = path();
    drop((path.admit(), path.resume(), path.refuse()));
    path
}

fn node() -> &'static mut Node {
    let node = kept(Node::new());
    let token = Node::new().give_slot();
    node.show_slot(&token);
    node
}

#[library_benchmark(config = at_most(15_100))]
#[bench::headers(path())]
fn parse(path: &'static mut ConnectPath) -> usize {
    black_box(path.parse()).websocket_key.len()
}

#[library_benchmark(config = at_most(52_800))]
#[bench::by_look_up(warm_path())]
fn admit(path: &'static mut ConnectPath) {
    drop(black_box(path.admit()));
}

#[library_benchmark(config = at_most(92_500))]
#[bench::by_token(warm_path())]
fn resume(path: &'static mut ConnectPath) {
    drop(black_box(path.resume()));
}

#[library_benchmark(config = at_most(46_900))]
#[bench::by_rule(warm_path())]
fn refuse(path: &'static mut ConnectPath) {
    drop(black_box(path.refuse()));
}

#[library_benchmark(config = at_most(23_100))]
#[bench::hit(kept(cases::rules(cases::RULES)), "v3.500.0-b10")]
#[bench::miss(kept(cases::rules(cases::RULES)), "v3.7.9-b10+build5")]
#[bench::hit_of_ten_thousand(kept(cases::rules(10 * cases::RULES)), "v3.500.0-b10")]
#[bench::miss_of_ten_thousand(kept(cases::rules(10 * cases::RULES)), "v3.7.9-b10+build5")]
fn verdict(rules: &'static mut RuleSet, firmware: &str) -> bool {
    black_box(cases::verdict(rules, black_box(firmware))).enforced.is_some()
}

#[library_benchmark(config = at_most(6_400))]
#[bench::three_conditions(kept(cases::range()))]
fn range(range: &'static mut Range) -> bool {
    black_box(range.matches(black_box(Some("3.8.0-b10"))))
}

#[library_benchmark(config = at_most(22_100))]
fn compare_four_pairs() {
    for (left, right) in cases::VERSIONS {
        black_box(compare(black_box(left), black_box(right)));
    }
}

#[library_benchmark(config = at_most(36_700))]
#[bench::sign(node())]
fn give_slot(node: &'static mut Node) {
    drop(black_box(node.give_slot()));
}

#[library_benchmark(config = at_most(39_300))]
#[bench::verify(node(), Node::new().give_slot())]
fn show_slot(node: &'static mut Node, token: Box<str>) {
    node.show_slot(black_box(&token));
}

#[library_benchmark(config = at_most(43_400))]
#[bench::token(warm_path())]
fn mint(path: &'static mut ConnectPath) {
    drop(black_box(path.mint()));
}

#[library_benchmark(config = at_most(40_900))]
#[bench::token(warm_path())]
fn verify(path: &'static mut ConnectPath) {
    drop(black_box(path.verify()));
}

#[library_benchmark(config = at_most(1_007_000))]
#[bench::sixty_four_devices(node())]
fn look_up(node: &'static mut Node) {
    node.look_up();
}

#[library_benchmark(config = at_most(3_200))]
fn read_frame() {
    drop(black_box(cases::read_frame()));
}

#[library_benchmark(config = at_most(4_300))]
fn write_frame() {
    drop(black_box(cases::write_frame()));
}

library_benchmark_group!(name = handshake, benchmarks = [parse, admit, resume, refuse]);
library_benchmark_group!(name = rules, benchmarks = [verdict, range, compare_four_pairs]);
library_benchmark_group!(name = tokens, benchmarks = [give_slot, show_slot, mint, verify]);
library_benchmark_group!(name = look_ups, benchmarks = [look_up]);
library_benchmark_group!(name = frames, benchmarks = [read_frame, write_frame]);

main!(library_benchmark_groups = [handshake, rules, tokens, look_ups, frames]);
