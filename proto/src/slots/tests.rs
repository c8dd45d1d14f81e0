use std::collections::BTreeMap;

use rand::{SeedableRng as _, rngs::SmallRng};
use uuid::Uuid;

use super::*;

const RATE: f64 = 100.0;
const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

fn device(n: u128) -> DeviceId {
    DeviceId::from_uuid(Uuid::from_u128(n))
}

fn at(ms: u64) -> Instant {
    Instant::from_micros(ms * 1_000)
}

fn wall(now: Instant) -> WallTime {
    WALL + now.saturating_since(Instant::ZERO)
}

/// One node, with its clocks.
struct Node {
    slots: Slots,
    rng: SmallRng,
}

impl Node {
    fn new() -> Self {
        Self::with(&SlotsConfig::default())
    }

    fn with(config: &SlotsConfig) -> Self {
        Self::named("a", config)
    }

    fn named(name: &str, config: &SlotsConfig) -> Self {
        Self {
            slots: Slots::new(config, SlotKeys::new(1, [7; 32]).with_issuer(name)),
            rng: SmallRng::seed_from_u64(1),
        }
    }

    /// Another node of the cluster.
    fn other() -> Self {
        Self::named("b", &SlotsConfig::default())
    }

    fn refuse_on(&mut self, n: u128, token: Option<&str>, now: Instant, wall: WallTime) -> Hint {
        let standing = self.slots.standing(device(n), token, now, wall);
        self.slots.refuse(
            device(n),
            &standing,
            HINT_MIN,
            Pace::Shared(RATE),
            (now, wall),
            &mut self.rng,
        )
    }

    fn refuse(&mut self, n: u128, token: Option<&str>, now: Instant) -> Hint {
        self.refuse_on(n, token, now, wall(now))
    }

    fn is_due(&self, n: u128, token: Option<&str>, now: Instant) -> bool {
        self.slots.standing(device(n), token, now, wall(now)).is_due
    }

    fn insert(&mut self, n: u128) {
        self.slots.handle_admitted(device(n), "default");
    }

    /// Refuses many others of the same tenant, until the queue is `ms` long.
    fn fill(&mut self, ms: u64) {
        for n in 0..u128::from(ms / 10) {
            self.slots.handle_admitted(device((1 << 64) + n), "default");
            self.refuse((1 << 64) + n, None, at(0));
        }
    }
}

#[test]
fn due_slot_is_shown_by_its_own_token_alone() {
    let mut node = Node::new();
    let token = node.refuse(1, None, at(0)).slot.unwrap();
    let shows = |node: &Node, n, token: &str, ms| node.slots.shows_due(device(n), token, at(ms), wall(at(ms)));

    assert!(shows(&node, 1, &token, 500));
    assert!(!shows(&node, 1, &token, 100), "it is still ahead");
    assert!(!shows(&node, 1, "", 500), "a remembered slot does not prove anything");
    assert!(!shows(&node, 2, &token, 500), "another's");
    assert!(!shows(&node, 1, &token, 70_000), "long ago");
    let later = node.refuse(1, Some(&token), at(500)).slot.unwrap();
    assert!(!shows(&node, 1, &token, 600), "there is a later one");
    assert!(shows(&node, 1, &later, 1_000));
}

#[test]
fn hints_follow_each_other_at_the_rate_and_are_never_under_half_a_second() {
    let mut node = Node::new();

    let hints: Vec<u64> = (0..5).map(|n| node.refuse(n, None, at(0)).after_ms()).collect();

    assert_eq!(hints, [500, 510, 520, 530, 540]);
}

#[test]
fn early_return_gets_the_same_slot_by_memory_and_by_token() {
    let mut node = Node::new();
    let mut other = Node::new();
    node.insert(1);
    node.fill(20_000);
    let first = node.refuse(1, None, at(0));
    assert_eq!(first.after_ms(), 20_500);

    let by_memory = node.refuse(1, None, at(4_000));
    let by_token = other.refuse(1, first.slot.as_deref(), at(8_000));
    let by_token_again = other.refuse(1, None, at(9_000));

    assert_eq!(by_memory.after_ms(), 16_500);
    assert_eq!(by_token.after_ms(), 12_500);
    assert_eq!(by_token_again.after_ms(), 11_500);
}

#[test]
fn slot_helps_from_300_ms_before_to_60_s_after_its_time() {
    let mut node = Node::new();
    node.insert(1);
    node.fill(20_000);
    let slot = 500 + 20_000;
    node.refuse(1, None, at(0));

    for (ms, is_due) in [
        (slot - 301, false),
        (slot - 300, true),
        (slot, true),
        (slot + 60_000, true),
        (slot + 60_001, false),
    ] {
        assert_eq!(node.is_due(1, None, at(ms)), is_due, "{ms}");
    }
}

#[test]
fn token_of_this_node_helps_from_300_ms_before_to_60_s_after_its_slot_even_after_a_restart() {
    let mut node = Node::new();
    node.insert(1);
    node.fill(20_000);
    let slot = 500 + 20_000;
    let token = node.refuse(1, None, at(0)).slot;
    let (restarted, other) = (Node::new(), Node::other());

    for (ms, is_due, is_due_there) in [
        (slot - 5_001, false, false),
        (slot - 301, false, true),
        (slot - 300, true, true),
        (slot + 60_000, true, true),
        (slot + 60_001, false, true),
        (slot + 65_001, false, false),
    ] {
        assert_eq!(restarted.is_due(1, token.as_deref(), at(ms)), is_due, "{ms}");
        assert_eq!(other.is_due(1, token.as_deref(), at(ms)), is_due_there, "{ms}");
    }
}

#[test]
fn token_holds_on_another_node_whose_clock_differs_by_five_seconds() {
    let mut node = Node::new();
    let other = Node::other();
    node.insert(1);
    node.fill(60_000);
    let hint = node.refuse(1, None, at(0));
    let now = at(hint.after_ms());

    for skew_ms in [-4_900, -1_000, 0, 1_000, 4_900, 60_000] {
        let there = WallTime::from_unix_ms(wall(now).as_unix_ms().checked_add_signed(skew_ms).unwrap());
        let standing = other.slots.standing(device(1), hint.slot.as_deref(), now, there);
        assert!(standing.is_due, "{skew_ms}");
        assert!(standing.tenant.is_some(), "the token says that it is known");
    }
}

#[test]
fn token_that_is_forged_expired_anothers_or_of_a_stepped_clock_is_as_none() {
    let mut node = Node::new();
    let other = Node::other();
    node.insert(1);
    node.fill(20_000);
    let token = node.refuse(1, None, at(0)).slot.unwrap();
    let now = at(20_500);
    assert!(other.is_due(1, Some(&token), now));

    let forged = token.replacen(|_| true, if token.starts_with('B') { "C" } else { "B" }, 1);
    let late = wall(now) + Duration::from_secs(66);
    let hour_back = WallTime::from_unix_ms(wall(now).as_unix_ms() - 3_600_000);

    assert!(
        other
            .slots
            .standing(device(1), Some(&forged), now, wall(now))
            .slot
            .is_none()
    );
    assert!(
        other
            .slots
            .standing(device(2), Some(&token), now, wall(now))
            .slot
            .is_none()
    );
    assert!(other.slots.standing(device(1), Some(&token), now, late).slot.is_none());
    assert!(
        other
            .slots
            .standing(device(1), Some(&token), now, hour_back)
            .slot
            .is_none()
    );
}

#[test]
fn stepped_wall_clock_changes_no_remembered_slot() {
    let mut node = Node::new();
    node.insert(1);
    node.fill(20_000);
    node.refuse(1, None, at(0));

    for step in [0, 7_200_000] {
        let stepped = WallTime::from_unix_ms(WALL.as_unix_ms() - 3_600_000 + step);
        assert_eq!(node.refuse_on(1, None, at(500), stepped).after_ms(), 20_000);
    }
}

#[test]
fn first_token_can_not_be_used_again_after_a_second_was_given() {
    let mut node = Node::new();
    node.slots.handle_admitted(device(1), "default");
    let first = node.refuse(1, None, at(0)).slot.unwrap();
    node.fill(20_000);
    let second = node.refuse(1, Some(&first), at(500));
    assert!(second.after_ms() > 10_000, "{second:?}");

    assert!(!node.is_due(1, Some(&first), at(1_000)));
    assert_eq!(
        node.refuse(1, Some(&first), at(1_500)).after_ms(),
        second.after_ms() - 1_000
    );
}

#[test]
fn far_slot_is_not_shortened_by_the_token_of_a_node_with_a_shorter_queue() {
    let mut node = Node::new();
    let mut idle = Node::other();
    node.insert(1);
    node.fill(400_000);
    let far = node.refuse(1, None, at(0));
    // Without its token, as after a loss of power.
    let near = idle.refuse(1, None, at(500));
    let nearer = idle.refuse(1, near.slot.as_deref(), at(1_500));
    let now = at(3_000);

    let again = node.refuse(1, nearer.slot.as_deref(), now);

    assert!(!node.is_due(1, nearer.slot.as_deref(), now));
    assert_eq!(again.after_ms() + 3_000, far.after_ms());
    assert!(!idle.is_due(1, far.slot.as_deref(), now), "nor is it by memory");
}

#[test]
fn tenant_of_a_token_is_used_if_the_device_was_unknown() {
    let mut node = Node::new();
    let mut other = Node::new();
    node.refuse(1, None, at(0));
    other.insert(1);
    let token = other.refuse(1, None, at(0)).slot;

    let standing = node.slots.standing(device(1), token.as_deref(), at(100), wall(at(100)));

    assert!(standing.tenant.is_some());
}

#[test]
fn far_slot_is_told_by_a_drawn_hint_and_kept_to_the_millisecond() {
    let mut node = Node::new();
    node.fill(2_000_000);
    node.slots.handle_admitted(device(1), "default");
    let slot = 500 + 2_000_000;

    let hints: Vec<Hint> = (0..50).map(|_| node.refuse(1, None, at(0))).collect();

    assert!(hints.iter().all(|hint| (450_000..=600_000).contains(&hint.after_ms())));
    assert!(
        hints.iter().any(|hint| hint.after_ms() != hints[0].after_ms()),
        "drawn, each time"
    );
    assert!(!node.is_due(1, None, at(slot - 301)));
    assert!(node.is_due(1, None, at(slot - 300)));
    let by_token = Node::new();
    assert!(!by_token.is_due(1, hints[0].slot.as_deref(), at(slot - 6_000)));
    assert!(by_token.is_due(1, hints[0].slot.as_deref(), at(slot)));
    assert_eq!(node.refuse(1, None, at(slot - 10_000)).after_ms(), 10_000);
}

#[test]
fn attempts_until_a_far_slot_stay_under_one_in_450_seconds_and_a_few() {
    for slot_s in [601, 700, 1_000, 5_000] {
        let mut node = Node::new();
        node.fill(slot_s * 1_000);
        node.slots.handle_admitted(device(1), "default");
        let (mut now, mut attempts) = (at(0), 0.0);

        while !node.is_due(1, None, now) {
            attempts += 1.0;
            now += node.refuse(1, None, now).after;
        }
        // The attempt that is admitted.
        attempts += 1.0;

        let most = 2.5 + slot_s as f64 / 450.0;
        assert!(attempts < most, "{attempts} for {slot_s} s");
    }
}

#[test]
fn only_the_authenticated_are_known_and_a_token_tells_other_nodes() {
    let mut node = Node::new();
    let other = Node::new();
    let of_unknown = node.refuse(1, None, at(0)).slot.unwrap();
    node.slots.handle_admitted(device(1), "acme");
    let of_known = node.refuse(1, None, at(0)).slot.unwrap();

    let tenant_there = |token: &str| other.slots.standing(device(1), Some(token), at(0), WALL).tenant;

    assert_eq!(tenant_there(&of_unknown), None);
    assert_eq!(tenant_there(&of_known), Some(TenantTag::of("acme")));
}

#[test]
fn admission_clears_the_slot() {
    let mut node = Node::new();
    node.refuse(1, None, at(0));
    assert!(node.is_due(1, None, at(500)));

    node.slots.handle_admitted(device(1), "acme");

    assert!(!node.is_due(1, None, at(500)));
}

#[test]
fn hammering_with_millions_of_ids_stays_bounded_and_leaves_tokens_that_work() {
    let config = SlotsConfig {
        slots_max: 20_000,
        known_max: 1_000,
        tenant_weights: BTreeMap::new(),
        ..SlotsConfig::default()
    };
    let mut node = Node::with(&config);
    let mut last = None;

    for n in 0..200_000 {
        last = node.refuse(n, None, at(0)).slot;
        node.slots.handle_admitted(device(u128::MAX - n), "default");
    }

    assert!(
        node.slots.state().remembered <= 5_000,
        "a quarter is for unknown devices"
    );
    assert_eq!(node.slots.state().known, 1_000);
    assert!(node.slots.state().stateless >= 195_000);
    let standing = node.slots.standing(device(199_999), last.as_deref(), at(0), WALL);
    assert!(standing.slot.is_some_and(|slot| slot.at > at(600_000)));
}

#[test]
fn floor_of_an_outage_delays_a_device_but_not_the_queue() {
    let mut node = Node::new();
    let standing = node.slots.standing(device(1), None, at(0), WALL);

    let held = node.slots.refuse(
        device(1),
        &standing,
        Duration::from_secs(20),
        Pace::Shared(RATE),
        (at(0), WALL),
        &mut node.rng,
    );

    assert_eq!(held.after_ms(), 20_000);
    assert_eq!(node.refuse(2, None, at(0)).after_ms(), 510);
}

#[test]
fn place_of_a_device_that_comes_back_early_is_given_to_one_more() {
    let mut node = Node::new();
    node.fill(10_000);
    for n in 1..=3 {
        node.insert(n);
    }
    let told = node.refuse(1, None, at(0)).after_ms();

    let again = node.refuse(1, None, at(5_000)).after_ms();
    node.refuse(1, None, at(5_500));
    let second = node.refuse(2, None, at(6_000)).after_ms();
    let third = node.refuse(3, None, at(6_000)).after_ms();

    assert_eq!(told, 10_500);
    assert_eq!(again + 5_000, told, "its slot stays");
    assert_eq!(second + 6_000, told, "the same place");
    assert_eq!(third + 6_000, told + 10, "a time is issued twice, not three times");
}

#[test]
fn device_that_was_told_to_come_before_its_slot_keeps_its_place_to_itself() {
    let mut node = Node::new();
    node.fill(900_000);
    node.insert(1);
    node.insert(2);
    let told = node.refuse(1, None, at(0)).after_ms();

    node.refuse(1, None, at(told));
    let second = node.refuse(2, None, at(told)).after_ms();

    assert!(told <= 600_000, "{told}");
    assert!(second + told > 900_500 || second >= 450_000, "{second}");
    assert_eq!(node.slots.tenants.shared(), 0);
}

#[test]
fn device_that_wakes_up_a_little_early_keeps_its_place_to_itself() {
    let mut node = Node::new();
    node.fill(10_000);
    node.insert(1);
    node.refuse(1, None, at(0));

    node.refuse(1, None, at(9_000));

    assert_eq!(node.slots.tenants.shared(), 0);
}

fn registry_index(devices: std::ops::Range<u128>, tenant: &str) -> Arc<RegistryIndex> {
    let mut builder = RegistryIndexBuilder::new([1; 16]);
    for n in devices {
        assert!(builder.add(device(n), tenant));
    }
    Arc::new(builder.finish(WALL))
}

#[test]
fn device_of_the_registry_index_is_known_to_a_node_that_never_saw_it() {
    let mut node = Node::new();
    node.slots.set_registry_index(registry_index(0..100, "acme"));

    let tenant_of = |n| node.slots.standing(device(n), None, at(0), WALL).tenant;

    assert_eq!(tenant_of(0), Some(TenantTag::of("acme")));
    assert_eq!(tenant_of(100), None);
}

#[test]
fn unknown_devices_never_delay_devices_of_the_registry_index_that_the_node_never_saw() {
    let mut node = Node::new();
    node.slots.set_registry_index(registry_index(0..100, "acme"));
    for n in 1_000..11_000 {
        node.refuse(n, None, at(0));
    }

    let last = (0..100).map(|n| node.refuse(n, None, at(0)).after_ms()).last();

    assert_eq!(last, Some(1_490));
}

#[test]
fn memory_holds_only_what_the_registry_index_does_not() {
    let mut node = Node::new();
    node.slots.set_registry_index(registry_index(0..100, "acme"));
    for n in 0..101 {
        node.slots.handle_admitted(device(n), "acme");
    }
    assert_eq!(node.slots.state().known, 1);

    node.slots.handle_tenant(device(0), "moved");
    let moved = node.slots.standing(device(0), None, at(0), WALL).tenant;
    node.slots.handle_tenant(device(0), "acme");

    assert_eq!(moved, Some(TenantTag::of("moved")));
    assert_eq!(node.slots.state().known, 1);
}

#[test]
fn what_a_token_says_counts_only_where_nothing_newer_is_known() {
    let mut node = Node::new();
    node.slots.set_registry_index(registry_index(0..1, "acme"));
    for n in 0..2 {
        node.slots.handle_hinted_tenant(device(n), "former");
    }

    let tenants = [0, 1].map(|n| node.slots.standing(device(n), None, at(0), WALL).tenant);

    assert_eq!(tenants, ["acme", "former"].map(|name| Some(TenantTag::of(name))));
}
