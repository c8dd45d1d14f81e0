//! The checks of every connecting device do not allocate. A separate binary, because it counts allocations.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    hint::black_box,
};

use seawall_proto::{
    firmware::compare,
    id::{DeviceId, Label, RuleId},
    rules::{Effect, Match, Mode, Rule, RuleSet, RuleSpec, Subject},
    time::WallTime,
};
use uuid::Uuid;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

#[expect(
    unsafe_code,
    reason = "an allocator can't be written without; each call is passed on unchanged"
)]
// SAFETY: all work is the system allocator's; counting touches a constant-initialised thread local without a
// destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.with(Cell::get);
    work();
    ALLOCATIONS.with(Cell::get) - before
}

fn rule(number: u32) -> Rule {
    let name = |text: &str| Label::parse(text).expect("a label");
    let matches = Match {
        firmware: Some(
            format!(">=3.{number}.0-b3,<3.{number}.9,!=3.{number}.1")
                .parse()
                .expect("a range"),
        ),
        model: name("camera").filter(|_| number.is_multiple_of(3)),
        tenant: name("acme").filter(|_| number.is_multiple_of(2)),
    };
    Rule {
        id: RuleId(Uuid::from_u128(u128::from(number))),
        spec: RuleSpec::new(matches, Effect::Block),
        created_at: WallTime::from_unix_ms(u64::from(number)),
        revision: 1,
    }
}

const FIRMWARE: [Option<&str>; 8] = [
    None,
    Some("main"),
    Some("FW_3.500.0-b10+build5"),
    Some("v3.500.0"),
    Some("3.501.1"),
    Some("2025-11-02"),
    Some("3.999.7-9-gabcdef"),
    Some("\u{c9}t\u{e9} 3.18446744073709551616~rc1"),
];

#[test]
fn the_counter_counts() {
    assert!(allocations(|| drop(black_box(Vec::<u8>::with_capacity(8)))) > 0);
}

#[test]
fn a_verdict_does_not_allocate() {
    let with_share = |number: u32| {
        let mut rule = rule(number);
        rule.spec.admit_percent = (number % 101) as u8;
        rule.spec.effect = Effect::ALL[number as usize % Effect::ALL.len()];
        rule.spec.update = (rule.spec.effect == Effect::Restrict).then(Default::default);
        rule.spec.allow = (0..u128::from(number % 50))
            .map(|device| DeviceId::from_uuid(Uuid::from_u128(device)))
            .collect();
        if number.is_multiple_of(7) {
            rule.spec.mode = Mode::DryRun;
        }
        rule
    };
    let set = RuleSet::compile(1, (0..10_000).map(with_share).collect());
    let mut hits = 0;

    let count = allocations(|| {
        for firmware in FIRMWARE {
            for model in [None, Some("camera"), Some("lock")] {
                for tenant in [None, Some("acme")] {
                    // Each rule admits most devices.
                    for device in 1..=64 {
                        let subject = Subject {
                            device: Some(DeviceId::from_uuid(Uuid::from_u128(device))),
                            firmware,
                            model,
                            tenant,
                        };
                        let verdict = set.verdict(&subject, WallTime::from_unix_ms(5));
                        hits += usize::from(verdict.enforced.or(verdict.dry_run).is_some());
                        black_box(set.evicting(&subject, WallTime::from_unix_ms(5)));
                    }
                }
            }
        }
    });

    assert!(hits > 0);
    assert_eq!(count, 0);
}

#[test]
fn comparing_versions_does_not_allocate() {
    let count = allocations(|| {
        for left in FIRMWARE.into_iter().flatten() {
            for right in FIRMWARE.into_iter().flatten() {
                black_box(compare(left, right));
            }
        }
    });

    assert_eq!(count, 0);
}
