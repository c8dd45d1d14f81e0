use std::{
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant as Clock},
};

use seawall_proto::refusal::Code;

use super::{groups::By, queue::Entry, *};
use crate::fleet::cohorts::Cohorts;

const RESET: Presence = Presence::Offline(Evidence::Reset);

/// A table with devices of one kind.
struct Rig {
    history: History,
    group: Arc<Group>,
}

impl Rig {
    fn new() -> Self {
        Self::with_bounds(KNOWN_MAX, QUEUE_LEN_MAX)
    }

    fn with_bounds(known_max: usize, queue_len_max: usize) -> Self {
        let history = History::with_bounds(known_max, queue_len_max);
        let cohort = Cohorts::new().intern(Some("m"), Some("1.0"));
        Self {
            group: history.groups().of(&cohort, &"default".into(), Some("m")),
            history,
        }
    }

    fn online(&self, device: DeviceId, epoch: u64, ms: u64) -> Option<u8> {
        self.came(device, epoch, ms).returned.map(Past::bits)
    }

    fn came(&self, device: DeviceId, session: u64, ms: u64) -> CameOnline {
        let began = Began {
            session: SessionId(session),
            group: &self.group,
            since: WallTime::from_unix_ms(ms),
            at: Instant::from_micros(ms * 1_000),
        };
        self.history.came_online(device, began, after)
    }

    fn offline(&self, device: DeviceId, epoch: u64, ms: u64, past: u8) -> bool {
        let offline = Offline {
            since: WallTime::from_unix_ms(ms),
            at: Instant::from_micros(ms * 1_000),
            reason: EndReason::ClientGone,
            evidence: Evidence::Reset,
            past: Past::of_bits(past),
        };
        self.history.went_offline(device, SessionId(epoch), offline).is_some()
    }

    /// Removes what was stored.
    fn remove(&self, len: u64) {
        let queue = self.history.queue();
        queue.remove_until(queue.front() + len);
    }

    fn stored(&self, number: u128, epoch: u64, presence: Presence) -> Stored<'_> {
        Stored {
            device: device(number),
            known: Known {
                epoch: SessionId(epoch),
                presence,
                since: WallTime::from_unix_ms(5),
            },
            reason: Reason::CONNECTED,
            group: &self.group,
        }
    }

    fn presence(&self, device: DeviceId) -> Presence {
        self.history.record(device).unwrap().known.presence
    }

    /// What waits for the database: number of the device, epoch, state.
    fn queued(&self) -> Vec<(u128, u64, PresenceState)> {
        let entries = self.history.queue().copy(0, 1_000).entries.into_iter();
        let transitions = entries.filter_map(|entry| match entry {
            Entry::Transition(transition) => Some(transition),
            Entry::Forget(_) => None,
        });
        transitions
            .map(|transition| {
                let known = transition.known;
                (
                    transition.device.as_uuid().as_u128(),
                    known.epoch.0,
                    PresenceState::of(known.presence),
                )
            })
            .collect()
    }
}

#[test]
fn keeps_the_last_twenty_attempts() {
    let history = History::default();

    for n in 0..30 {
        history.refused(device(1), WallTime::from_unix_ms(n), Outcome::Refused(Code::Overloaded));
    }
    history.admitted(device(1), WallTime::from_unix_ms(30));

    let attempts = history.record(device(1)).unwrap().attempts;
    assert_eq!(attempts.len(), ATTEMPTS_MAX);
    assert_eq!(attempts[0].at, WallTime::from_unix_ms(11));
    assert_eq!(attempts[19].outcome, Outcome::Admitted);
}

#[test]
fn made_up_ids_neither_grow_it_nor_push_out_real_devices() {
    let history = History::default();
    history.admitted(device(1), WallTime::from_unix_ms(1));

    for n in 0..50_000 {
        let code = Outcome::Refused(Code::Unauthorized);
        history.refused(device(1_000 + n), WallTime::from_unix_ms(2), code);
    }

    let len = |shard: &Mutex<UnknownIds>| {
        let shard = shard.lock().unwrap();
        shard.young.len() + shard.old.len()
    };
    let unknown: usize = history.unknown_ids.iter().map(len).sum();
    assert!(unknown <= 2 * STRANGERS_MAX, "{unknown}");
    assert_eq!(history.record(device(1)).unwrap().attempts.len(), 1);
    assert_eq!(history.known_len(), 1);
}

#[test]
fn device_that_was_held_was_not_online_when_it_returns_in_a_new_session() {
    let rig = Rig::new();
    let held = Known {
        epoch: SessionId(1),
        presence: Presence::Unknown(Cause::Path),
        since: WallTime::from_unix_ms(5),
    };

    assert!(!rig.came(device(1), 1, 1).was_online);
    assert!(rig.history.handle(device(1), held, Cause::Path.into()).is_some());
    let returned = rig.came(device(1), 2, 2);

    assert!(
        !returned.was_online && returned.returned == Some(Past::default()),
        "{returned:?}"
    );
    assert!(rig.came(device(1), 3, 3).was_online);
}

#[test]
fn session_soon_after_another_of_the_device_is_a_return() {
    let rig = Rig::new();

    assert_eq!(rig.online(device(1), 1, 0), None, "the first");
    assert_eq!(rig.online(device(1), 2, 1), Some(0), "it replaced one");
    rig.offline(device(1), 2, 1_000, 2);
    assert_eq!(rig.online(device(1), 3, 600_000), Some(2));
    rig.offline(device(1), 3, 600_000, 3);
    assert_eq!(rig.online(device(1), 4, 1_200_000), None, "ten minutes later");
}

#[test]
fn late_close_changes_neither_state_nor_counts_nor_the_queue() {
    let rig = Rig::new();
    rig.online(device(1), 1, 1);
    rig.online(device(1), 2, 2);

    assert!(!rig.offline(device(1), 1, 3, 0));

    assert_eq!(rig.presence(device(1)), Presence::Online);
    assert_eq!(rig.history.groups().total().online, 1);
    let online = PresenceState::Online;
    assert_eq!(rig.queued(), [(1, 1, online), (1, 2, online)]);
    assert!(rig.offline(device(1), 2, 4, 0));
    assert_eq!(rig.history.groups().by(By::Tenant)[&Some("default".into())].offline, 1);
}

#[test]
fn counts_follow_a_device_to_its_new_version() {
    let rig = Rig::new();
    rig.online(device(1), 1, 1);
    rig.offline(device(1), 1, 2, 0);
    let newer = Cohorts::new().intern(Some("m"), Some("2.0"));
    let began = Began {
        session: SessionId(2),
        group: &rig.history.groups().of(&newer, &rig.group.tenant, Some("m")),
        since: WallTime::from_unix_ms(3),
        at: Instant::ZERO,
    };

    rig.history.came_online(device(1), began, after);

    let by = rig.history.groups().by(By::Firmware);
    assert_eq!(by.keys().flatten().map(|key| &**key).collect::<Vec<_>>(), ["2.0"]);
    assert_eq!(rig.history.groups().total().total(), 1);
    rig.history.forget(device(1));
    assert_eq!(rig.history.groups().total().total(), 0);
}

#[test]
fn counts_follow_a_device_to_its_new_tenant_and_model_in_the_registry() {
    let rig = Rig::new();
    rig.online(device(1), 1, 1);

    rig.history.handle_registered(device(1), &"other".into(), Some("n"));
    rig.history.handle_registered(device(2), &"other".into(), Some("n"));

    let groups = rig.history.groups();
    assert_eq!(groups.by(By::Tenant)[&Some("other".into())].online, 1);
    assert_eq!(groups.by(By::Model)[&Some("n".into())].online, 1);
    assert_eq!((groups.total().total(), groups.by(By::Tenant).len()), (1, 1));
    // Its session began before.
    assert!(rig.offline(device(1), 1, 2, 0));
    assert_eq!(groups.by(By::Model)[&Some("n".into())].offline, 1);
}

#[test]
fn device_that_moved_to_another_node_is_not_counted_unless_its_socket_is_here() {
    let rig = Rig::new();
    for number in 1..=3 {
        rig.online(device(number), 1, 1);
    }
    rig.offline(device(1), 1, 2, 0);
    rig.offline(device(2), 1, 2, 0);
    assert_eq!(rig.history.away(None, 9), [device(1), device(2)]);
    assert_eq!(rig.history.away(Some(device(2)), 9), [device(2)]);

    for number in [1, 3] {
        rig.history.leave_moved(device(number), |known| !known.is_held());
    }

    let total = rig.history.groups().total();
    assert_eq!((total.online, total.offline, total.unknown), (1, 1, 0));
    assert_eq!(rig.history.epoch(device(1)), SessionId(1), "its next session is newer");
    rig.online(device(1), 3, 5);
    assert_eq!(rig.history.groups().total().online, 2);
}

#[test]
fn full_table_forgets_who_was_offline_for_longest_and_nobody_who_is_online() {
    let rig = Rig::with_bounds(4 * SHARDS, QUEUE_LEN_MAX);
    let of_one_shard: Vec<DeviceId> = (0..)
        .map(spread)
        .filter(|id| hash(*id) >> (u64::BITS - SHARD_BITS) == 5)
        .take(7)
        .collect();
    for (number, id) in (0..).zip(&of_one_shard[..4]) {
        rig.online(*id, 10 + number, number);
    }
    rig.offline(of_one_shard[2], 12, 50, 0);
    rig.offline(of_one_shard[1], 11, 60, 0);

    for id in &of_one_shard[4..] {
        rig.online(*id, 99, 99);
    }

    let is_known = |index: usize| rig.history.record(of_one_shard[index]).is_some();
    assert_eq!(
        [0, 1, 2, 3, 4, 5, 6].map(is_known),
        [true, false, false, true, true, true, true]
    );
    assert_eq!((rig.history.known_len(), rig.history.groups().total().online), (5, 5));
}

#[test]
fn full_queue_drops_transitions_counts_them_and_keeps_the_newest_state() {
    let rig = Rig::with_bounds(KNOWN_MAX, 3);
    let (online, offline) = (PresenceState::Online, PresenceState::Offline);
    for n in 1..=5 {
        rig.online(device(n), 1, 1);
    }
    rig.offline(device(4), 1, 2, 0);
    assert_eq!(rig.queued(), [(1, 1, online), (2, 1, online), (3, 1, online)]);
    assert_eq!(
        (rig.history.queue().dropped(), rig.history.queue().is_behind()),
        (3, true)
    );

    rig.history.catch_up();
    assert!(rig.history.queue().is_behind(), "there is no room");
    rig.remove(3);
    rig.history.catch_up();

    let mut queued = rig.queued();
    queued.sort_by_key(|(device, ..)| *device);
    assert_eq!(queued, [(4, 1, offline), (5, 1, online)]);
    assert!(!rig.history.queue().is_behind());
    rig.remove(2);
    rig.history.catch_up();
    assert!(rig.queued().is_empty(), "each is queued once");
}

#[test]
fn what_the_database_had_is_unknown_after_a_restart_and_yields_to_what_is_newer() {
    let rig = Rig::new();
    rig.online(device(3), 7, 8);
    rig.remove(1);
    let restore = |number, presence| rig.history.restore(rig.stored(number, 1, presence), RESTARTED);
    let at = WallTime::from_unix_ms(400_000);

    assert_eq!(restore(1, Presence::Online), Restored::Awaited { is_new: true });
    assert_eq!(restore(2, RESET), Restored::Known);
    assert_eq!(restore(3, Presence::Online), Restored::Known);

    assert_eq!(rig.presence(device(1)), Presence::Unknown(Cause::NodeRestarted));
    assert_eq!(
        (rig.presence(device(2)), rig.presence(device(3))),
        (RESET, Presence::Online)
    );
    assert_eq!(rig.queued(), [(1, 1, PresenceState::Unknown)], "only what is news");
    assert_eq!(restore(1, Presence::Online), Restored::Awaited { is_new: false });
    assert_eq!(
        rig.online(device(1), 8, 10),
        None,
        "a restart is not a fault of the device"
    );
    assert!(rig.history.give_up(device(1), at, None).is_none());
    restore(4, Presence::Online);
    let change = rig.history.give_up(device(4), at, None).unwrap();
    let evidence = Evidence::NotBack {
        since: WallTime::from_unix_ms(9),
    };
    assert_eq!(change.known.presence, Presence::Offline(evidence));
    assert_eq!(change.reason.as_str(), "not_back");
}

#[test]
fn stored_state_with_a_greater_epoch_never_overrides_a_socket_that_is_here() {
    let rig = Rig::new();
    let held = Known {
        epoch: SessionId(3),
        presence: Presence::Unknown(Cause::Path),
        since: WallTime::from_unix_ms(5),
    };
    rig.online(device(1), 3, 8);
    rig.online(device(2), 3, 8);
    assert!(rig.history.handle(device(2), held, Cause::Path.into()).is_some());

    for number in [1, 2] {
        for presence in [RESET, Presence::Online] {
            let restored = rig.history.restore(rig.stored(number, 900, presence), RESTARTED);
            assert_eq!(restored, Restored::Outdone);
        }
    }

    assert_eq!(rig.presence(device(1)), Presence::Online);
    assert_eq!(rig.presence(device(2)), Presence::Unknown(Cause::Path));
}

#[test]
fn session_of_a_node_whose_clock_is_behind_is_online_and_its_end_counts() {
    let rig = Rig::new();
    // Another node reported the device with a greater epoch before it came here.
    rig.history.restore(rig.stored(1, 900, RESET), RESTARTED);
    assert_eq!(rig.history.epoch(device(1)), SessionId(900));

    let came = rig.came(device(1), 5, 50);
    let report = |session, presence| {
        let known = Known {
            epoch: SessionId(session),
            presence,
            since: WallTime::from_unix_ms(60),
        };
        rig.history.handle(device(1), known, Reason::HEARD)
    };

    assert_eq!(
        (rig.presence(device(1)), came.epoch),
        (Presence::Online, SessionId(901))
    );
    let held = report(5, Presence::Unknown(Cause::Path)).unwrap();
    assert_eq!(held.known.epoch, SessionId(901));
    assert!(report(4, Presence::Online).is_none(), "of a session before it");
    assert!(report(5, Presence::Online).is_some());
    assert!(!rig.offline(device(1), 4, 70, 0));
    assert!(rig.offline(device(1), 5, 70, 0));
    assert_eq!(rig.presence(device(1)), RESET);
    let (online, unknown, offline) = (PresenceState::Online, PresenceState::Unknown, PresenceState::Offline);
    assert_eq!(
        rig.queued(),
        [(1, 901, online), (1, 901, unknown), (1, 901, online), (1, 901, offline)]
    );
    assert_eq!(rig.history.groups().total().offline, 1);
}

#[test]
fn device_is_claimed_once_it_is_known_that_the_database_has_a_greater_epoch() {
    let rig = Rig::new();
    rig.online(device(1), 5, 50);
    rig.remove(1);

    let claimed = rig.history.claim(device(1), SessionId(900), after).unwrap();

    assert_eq!(
        (claimed.known.epoch, claimed.known.presence),
        (SessionId(901), Presence::Online)
    );
    assert_eq!(claimed.known.since, WallTime::from_unix_ms(50));
    assert_eq!(rig.queued(), [(1, 901, PresenceState::Online)]);
    assert!(
        rig.history.claim(device(1), SessionId(900), after).is_none(),
        "it is greater now"
    );
    assert!(rig.offline(device(1), 5, 60, 0));
    assert!(
        rig.history.claim(device(1), SessionId(999), after).is_none(),
        "nothing is held"
    );
    rig.online(device(1), 902, 70);
    assert!(!rig.offline(device(1), 5, 80, 0), "a late close of the claimed session");
}

#[test]
fn what_is_concluded_about_the_session_of_another_node_is_older_than_the_next_word_of_it() {
    let rig = Rig::new();
    let lost = Lost {
        cause: Cause::NodeLost,
        concluded_from: Some(40),
        ..RESTARTED
    };
    let numbers = || -> Vec<u64> {
        let entries = rig.history.queue().copy(0, 10).entries.into_iter();
        let number = |entry| match entry {
            Entry::Transition(transition) => transition.number,
            Entry::Forget(_) => 0,
        };
        entries.map(number).collect()
    };

    rig.history.restore(rig.stored(1, 9, Presence::Online), lost);
    rig.history
        .give_up(device(1), WallTime::from_unix_ms(99), Some(41))
        .unwrap();

    assert_eq!(numbers(), [41, 42]);
    rig.online(device(2), 10, 1);
    assert_eq!(numbers()[2] % 4, 0);
}

#[test]
fn device_that_another_node_has_is_left_to_it() {
    let rig = Rig::new();
    rig.history.admitted(device(1), WallTime::from_unix_ms(1));
    rig.history.restore(rig.stored(1, 9, Presence::Online), RESTARTED);

    rig.history.leave(device(1));

    let record = rig.history.record(device(1)).unwrap();
    assert!(record.group.is_none() && record.attempts.len() == 1);
    assert_eq!(rig.history.groups().total().total(), 0);
    assert!(
        rig.history
            .give_up(device(1), WallTime::from_unix_ms(9), None)
            .is_none()
    );
    assert_eq!(rig.history.epoch(device(1)), SessionId(9), "a session here is newer");
    rig.online(device(1), 10, 10);
    rig.history.leave(device(1));
    assert_eq!(rig.presence(device(1)), Presence::Online);
}

#[test]
fn states_of_all_sockets_that_are_here_are_written_again() {
    let rig = Rig::with_bounds(KNOWN_MAX, 4);
    for n in 1..=4 {
        rig.online(device(n), 1, 1);
    }
    rig.remove(4);
    rig.offline(device(4), 1, 2, 0);
    rig.remove(1);

    rig.history.repeat_held();
    rig.history.catch_up();

    let mut queued = rig.queued();
    queued.sort_by_key(|(device, ..)| *device);
    let online = PresenceState::Online;
    assert_eq!(queued, [(1, 1, online), (2, 1, online), (3, 1, online)]);
    assert_eq!(rig.history.queue().dropped(), 0);
}

#[test]
fn full_table_never_forgets_a_device_whose_socket_is_here() {
    let rig = Rig::with_bounds(3 * SHARDS, 3);
    let of_one_shard: Vec<DeviceId> = (0..)
        .map(spread)
        .filter(|id| hash(*id) >> (u64::BITS - SHARD_BITS) == 5)
        .take(5)
        .collect();
    let held = Known {
        epoch: SessionId(1),
        presence: Presence::Unknown(Cause::NodeLagging),
        since: WallTime::from_unix_ms(2),
    };
    for id in &of_one_shard[..3] {
        rig.online(*id, 1, 1);
    }
    // The queue is full: these wait to be written.
    rig.history.handle(of_one_shard[0], held, Reason::OTHER).unwrap();
    rig.offline(of_one_shard[1], 1, 3, 0);
    rig.online(of_one_shard[3], 1, 9);
    let is_known = |index: usize| rig.history.record(of_one_shard[index]).is_some();

    assert_eq!(
        [0, 1, 2, 3].map(is_known),
        [true, false, true, true],
        "it is bounded all the same"
    );
    rig.online(of_one_shard[4], 1, 9);
    assert_eq!([0, 2, 3, 4].map(is_known), [true; 4]);
}

#[test]
fn two_writers_that_stored_the_same_changes_remove_them_once() {
    let rig = Rig::new();
    for n in 1..=5 {
        rig.online(device(n), 1, 1);
    }
    let queue = rig.history.queue();
    let (first, second) = (queue.copy(0, 2), queue.copy(0, 3));

    queue.remove_until(second.start + second.entries.len() as u64);
    queue.remove_until(first.start + first.entries.len() as u64);

    assert_eq!((queue.len(), queue.front()), (2, 3));
    assert_eq!((queue.copy(0, 9).start, queue.copy(4, 9).entries.len()), (3, 1));
}

#[test]
fn pages_are_complete_and_in_the_order_of_ids() {
    let rig = Rig::new();
    for n in 0..5_000 {
        rig.online(spread(n), 1, 1);
        if n % 3 == 0 {
            rig.offline(spread(n), 1, 2, 0);
        }
    }
    let mut expected: Vec<DeviceId> = (0..5_000).filter(|n| n % 3 == 0).map(spread).collect();
    expected.sort_unstable();

    let (mut seen, mut first) = (Vec::new(), None);
    loop {
        let mut page = rig.history.page(first, 101, Some(PresenceState::Offline), |_| true);
        first = (page.len() == 101).then(|| page.pop()).flatten();
        seen.extend(page);
        if first.is_none() {
            break;
        }
    }

    assert_eq!(seen, expected);
    assert!(
        rig.history
            .page(None, 10, None, |group| group.cohort.firmware.is_none())
            .is_empty()
    );
}

/// A million devices: what each takes, and how long a page and counts take. Times are of an optimized build.
#[test]
#[cfg_attr(debug_assertions, ignore = "measures an optimized build")]
fn million_devices_are_paged_and_counted_in_time_measured() {
    let (pages, counts) = paged_and_counted(1_000_000);

    for took in pages {
        assert!(took <= Duration::from_millis(50), "{took:?}");
    }
    assert!(counts <= Duration::from_millis(5), "{counts:?}");
}

#[test]
fn many_devices_are_paged_and_counted() {
    paged_and_counted(20_000);
}

/// Times of three pages and of the counts.
fn paged_and_counted(devices: u128) -> ([Duration; 3], Duration) {
    let rig = Rig::new();
    let cohorts = Cohorts::new();
    let versions: Vec<_> = (0..50)
        .map(|n| cohorts.intern(Some("m"), Some(&format!("3.{n}.0"))))
        .collect();
    let tenants: Vec<Arc<str>> = (0..100).map(|n| format!("tenant-{n}").into()).collect();
    for n in 0..devices {
        let index = usize::try_from(n).unwrap();
        let began = Began {
            session: SessionId(1),
            group: &rig.history.groups().of(
                &versions[index % versions.len()],
                &tenants[index / 7 % tenants.len()],
                Some("m"),
            ),
            since: WallTime::from_unix_ms(1),
            at: Instant::ZERO,
        };
        rig.history.admitted(spread(n), WallTime::from_unix_ms(1));
        rig.history.came_online(spread(n), began, after);
        if n % 10 == 0 {
            rig.offline(spread(n), 1, 2, 0);
        }
    }
    let len = rig.history.known_len();
    assert_eq!(len as u128, devices);
    let capacity: usize = rig
        .history
        .shards
        .iter()
        .map(|shard| shard.lock().unwrap().capacity())
        .sum();
    let bytes = capacity * size_of::<Kept>() / len;

    let timed = |work: &dyn Fn() -> usize| {
        let took = (0..5).map(|_| {
            let begun = Clock::now();
            let found = work();
            (begun.elapsed(), found)
        });
        took.min().unwrap()
    };
    let offline = Some(PresenceState::Offline);
    let page = timed(&|| {
        rig.history
            .page(None, 101, offline, |group| &*group.tenant == "tenant-7")
            .len()
    });
    let last = timed(&|| rig.history.page(Some(spread(77)), 101, offline, |_| true).len());
    let none = timed(&|| {
        rig.history
            .page(None, 101, Some(PresenceState::Unknown), |_| true)
            .len()
    });
    let counts = timed(&|| rig.history.groups().by(By::Tenant).len());
    println!("{bytes} bytes per device; a page takes {page:?}, {last:?}, an empty one {none:?}, counts {counts:?}");

    // A shard with few devices has room for four more.
    let bytes_max = if len < 1_000_000 { 90 } else { 72 };
    assert!(bytes <= bytes_max, "{bytes} bytes per device");
    let of_tenant = (0..devices).filter(|n| n % 10 == 0 && n / 7 % 100 == 7).count();
    assert_eq!((page.1, last.1, none.1, counts.1), (of_tenant.min(101), 101, 0, 100));
    ([page.0, last.0, none.0], counts.0)
}

#[test]
fn walking_all_of_it_holds_nobody_up_for_long() {
    let rig = Rig::new();
    for n in 0..200_000 {
        rig.online(spread(n), 1, 1);
    }
    // Nobody is so: each walk goes through all.
    let walk = || rig.history.page(None, 10, Some(PresenceState::Unknown), |_| true).len();
    let begun = Clock::now();
    assert_eq!(walk(), 0);
    let took = begun.elapsed();

    // Devices come while somebody walks through all of it, again and again.
    let is_over = AtomicBool::new(false);
    let mut waits: Vec<Duration> = thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                walk();
            }
        });
        let waits = (0..20_000).map(|n| {
            let begun = Clock::now();
            rig.history.admitted(spread(n), WallTime::from_unix_ms(1));
            begun.elapsed()
        });
        let waits = waits.collect();
        is_over.store(true, Ordering::Relaxed);
        waits
    });

    waits.sort_unstable();
    let (most, longest) = (waits[waits.len() * 95 / 100], waits[waits.len() - 1]);
    println!("a walk takes {took:?}; 95 % of devices waited at most {most:?}, the last one {longest:?}");
    // Under one lock half of them wait for half a walk and more.
    assert!(most < took / 8, "{most:?} of {took:?}");
}

const RESTARTED: Lost = Lost {
    cause: Cause::NodeRestarted,
    at: WallTime::from_unix_ms(9),
    concluded_from: None,
};

const fn after(known: SessionId) -> SessionId {
    SessionId(known.0 + 1)
}

/// Ids whose bytes spread as those of random ids do.
fn spread(n: u128) -> DeviceId {
    device(n.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}

fn device(n: u128) -> DeviceId {
    DeviceId::from_uuid(uuid::Uuid::from_u128(n))
}
