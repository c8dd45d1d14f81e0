//! What decisions cost in instructions, which no neighbour on the machine changes, each with a bound: CONTRIBUTING.md says how to run it.
//! A bound is a fifth above what was counted when it was set; a change that needs a higher one says why.

mod cases;

use std::hint::black_box;

use cases::{Door, Node};
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

/// What a bench works on lives on: to drop it is no part of the work.
fn kept<T>(of: T) -> &'static mut T {
    Box::leak(Box::new(of))
}

fn door() -> &'static mut Door {
    kept(Door::new())
}

/// A door that has been passed before: what is initialised once is.
fn used_door() -> &'static mut Door {
    let door = door();
    drop((door.admit(), door.resume(), door.refuse()));
    door
}

fn node() -> &'static mut Node {
    let node = kept(Node::new());
    let token = Node::new().give_slot();
    node.show_slot(&token);
    node
}

#[library_benchmark(config = at_most(15_100))]
#[bench::headers(door())]
fn parse(door: &'static mut Door) -> usize {
    black_box(door.parse()).websocket_key.len()
}

#[library_benchmark(config = at_most(52_800))]
#[bench::by_look_up(used_door())]
fn admit(door: &'static mut Door) {
    drop(black_box(door.admit()));
}

#[library_benchmark(config = at_most(92_500))]
#[bench::by_token(used_door())]
fn resume(door: &'static mut Door) {
    drop(black_box(door.resume()));
}

#[library_benchmark(config = at_most(46_900))]
#[bench::by_rule(used_door())]
fn refuse(door: &'static mut Door) {
    drop(black_box(door.refuse()));
}

#[library_benchmark(config = at_most(23_100))]
#[bench::hit(kept(cases::rules(cases::RULES)), "v3.500.0-b10")]
#[bench::miss(kept(cases::rules(cases::RULES)), "v3.7.9-b10+build5")]
fn evaluate(rules: &'static mut RuleSet, firmware: &str) -> bool {
    black_box(cases::evaluate(rules, black_box(firmware))).is_some()
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
#[bench::token(used_door())]
fn mint(door: &'static mut Door) {
    drop(black_box(door.mint()));
}

#[library_benchmark(config = at_most(40_900))]
#[bench::token(used_door())]
fn weigh(door: &'static mut Door) {
    drop(black_box(door.weigh()));
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
library_benchmark_group!(name = rules, benchmarks = [evaluate, range, compare_four_pairs]);
library_benchmark_group!(name = tokens, benchmarks = [give_slot, show_slot, mint, weigh]);
library_benchmark_group!(name = look_ups, benchmarks = [look_up]);
library_benchmark_group!(name = frames, benchmarks = [read_frame, write_frame]);

main!(library_benchmark_groups = [handshake, rules, tokens, look_ups, frames]);
