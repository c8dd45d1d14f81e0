//! Versions that have not proved themselves, within the order of decisions.

use std::{cmp::Reverse, collections::BinaryHeap};

use rand::Rng as _;

use super::*;
use crate::{
    cohort::Kind,
    proving::{Asking, Member, VersionState},
};

/// Device 1 is registered. Version 1 is known, and there are 5,000 sessions.
fn limiting() -> Node {
    let mut node = Node::usual();
    let mut index = RegistryIndexBuilder::new([1; 16]);
    for device in 1..=60 {
        index.add(id(device), "acme");
    }
    node.connect.set_registry_index(Arc::new(index.finish(WALL)));
    node.sessions = 5_000;
    node.connect.proving_mut().handle_known(None, Some("1"));
    node.connect.proving_mut().handle_loaded(false);
    node
}

/// Takes the room of version 2.
fn fill(node: &mut Node) {
    let now = node.now;
    let proving = node.connect.proving_mut();
    proving.handle_admitted(None, Some(&label("2")), now);
    for n in 0..50 {
        let member = Member {
            device: id(100 + n),
            kind: Kind::of(Some("cam"), Some("2")),
        };
        proving.handle_opened(member, now);
    }
}

#[test]
fn device_without_room_is_told_when_to_return_and_costs_no_look_up() {
    let mut node = limiting();
    node.admit(&said("2"));
    fill(&mut node);
    let asked = node.asked;

    let refusal = node.refuse(&said("2"));

    assert_eq!((refusal.code, refusal.code.status()), (Code::Overloaded, 503));
    let hint = refusal.hint.unwrap();
    assert!((120_000..=130_000).contains(&hint.after_ms()), "{hint:?}");
    assert!(hint.slot.is_some());
    assert_eq!(node.asked, asked);
    node.admit(&said("1"));
}

#[test]
fn due_slot_does_not_make_room_and_early_return_keeps_its_slot() {
    let mut node = limiting();
    fill(&mut node);
    let first = node.refuse(&said("2")).hint.unwrap();

    node.now += Duration::from_secs(10);
    let early = node.refuse(&said("2")).hint.unwrap();
    assert_eq!(early.after, first.after - Duration::from_secs(10));

    node.now += early.after;
    fill(&mut node);
    let again = node.refuse(&said("2")).hint.unwrap();
    assert!(again.after_ms() >= 100_000, "{again:?}");
}

#[test]
fn resume_token_proves_the_device_and_not_its_firmware() {
    let mut node = limiting();
    let admitted = node.admit(&said("1"));
    let minted = admitted.grant.mint(&RESUME_KEYS, SessionId(9), LIFE, WALL).unwrap();
    let mut upgraded = Said {
        resume: Some(minted.text),
        ..said("2")
    };
    let asked = node.asked;

    fill(&mut node);
    let refusal = node.refuse(&upgraded);
    assert_eq!(refusal.code, Code::Overloaded);

    // It is still valid: with the old version, and once there is room.
    upgraded.firmware = label("1");
    assert!(node.admit(&upgraded).resumed.is_some());
    upgraded.firmware = label("2");
    let now = node.now;
    node.connect
        .proving_mut()
        .handle_stored(None, Some(&label("2")), VersionState::Proven, now);
    assert!(node.admit(&upgraded).resumed.is_some());
    assert_eq!(node.asked, asked);
}

#[test]
fn rules_and_wrong_credentials_come_first_and_unknown_devices_take_no_room() {
    let mut node = limiting();
    fill(&mut node);
    let unregistered = Said {
        device: id(77),
        ..said("2")
    };

    assert_eq!(node.refuse(&unregistered).code, Code::Unauthorized);
    node.rules = by_firmware("=2");
    assert_eq!(node.refuse(&said("2")).code, Code::FirmwareBlocked);
}

#[test]
fn version_gets_its_entry_by_an_authenticated_device_only() {
    let mut node = limiting();

    node.refuse(&Said {
        firmware: label("2"),
        ..wrong()
    });
    assert!(!node.connect.proving().is_testing());
    node.admit(&said("2"));
    assert!(node.connect.proving().is_testing());
}

#[test]
fn attempts_that_admission_refuses_take_no_room() {
    let mut node = limiting();
    node.admit(&said("2"));
    node.connect.handle_registry(Registry::Absent, node.now);

    for device in 1..=60 {
        let other = Said {
            device: id(device),
            ..said("2")
        };
        assert_eq!(node.refuse(&other).code, Code::RegistryUnavailable);
    }

    let asking = Asking {
        cohort: CohortTag::of(None, Some("2")),
        sessions: node.sessions,
        k_ref: CAPACITY,
    };
    let now = node.now;
    assert_eq!(node.connect.proving_mut().ask(asking, now), Ok(()));
}

#[test]
fn unknown_devices_take_no_room_of_a_version() {
    let mut node = limiting();
    node.admit(&said("2"));
    for device in 100..200 {
        let unregistered = Said {
            device: id(device),
            ..said("2")
        };
        node.refuse(&unregistered);
    }

    node.admit(&said("2"));
}

// === A storm ===

/// Keys per second that the database answers.
const CAPACITY: f64 = 2_000.0;

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrive(u64),
    Answer(u64),
    Second,
    Wake,
}

/// All devices connect within a second, and return when they are told. `firmware` says which version a device has.
/// Returns when each is admitted, in seconds.
fn storm(devices: u64, limits: bool, firmware: impl Fn(u64) -> &'static str) -> Vec<f64> {
    let mut index = RegistryIndexBuilder::new([1; 16]);
    for device in 0..devices {
        index.add(id(device.into()), "acme");
    }
    let mut node = Node::new([]);
    node.connect.set_registry_index(Arc::new(index.finish(WALL)));
    node.connect.set_last_known_good(CAPACITY);
    node.connect.proving_mut().handle_known(None, Some("1"));
    if limits {
        node.connect.proving_mut().handle_loaded(false);
    }
    // They show no slot tokens, since the wall clock of these tests stands still. The node remembers their slots.
    let claims: Vec<Said> = (0..devices)
        .map(|device| Said {
            device: id(device.into()),
            ..said(firmware(device))
        })
        .collect();
    let mut events = BinaryHeap::from([Reverse((Instant::ZERO, Event::Second))]);
    for device in 0..devices {
        let at = Instant::from_micros(node.rng.random_range(0..1_000_000));
        events.push(Reverse((at, Event::Arrive(device))));
    }
    let (mut sent, mut free_at) = (Vec::<Option<Statement>>::new(), Instant::ZERO);
    let (mut tickets, mut admitted) = (BTreeMap::new(), vec![None; claims.len()]);
    let mut left = devices;
    while left > 0 {
        let Reverse((now, event)) = events.pop().expect("devices return");
        assert!(now < Instant::ZERO + Duration::from_secs(600), "{left} are not back");
        node.now = now;
        let mut concluded = Vec::new();
        match event {
            Event::Arrive(device) => {
                let said = claims[usize::try_from(device).unwrap()].clone();
                match node.enter(&said) {
                    Step::Waiting(ticket) => {
                        tickets.insert(ticket, device);
                    }
                    Step::Concluded(conclusion) => concluded.push((device, conclusion)),
                }
            }
            Event::Answer(statement) => {
                let statement = sent[usize::try_from(statement).unwrap()].take().unwrap();
                let row = |device| {
                    Row::Found(DeviceRecord {
                        id: device,
                        ..record(DeviceState::Enabled)
                    })
                };
                node.connect.handle_answered(&statement, row, TOOK, now, &mut node.rng);
            }
            Event::Second => {
                node.connect.handle_second(node.sessions, now);
                events.push(Reverse((now + Duration::from_secs(1), Event::Second)));
            }
            Event::Wake => {}
        }
        loop {
            match node.poll() {
                Output::Send(statement) => {
                    let work = Duration::from_secs_f64(statement.batch.keys.len() as f64 / CAPACITY);
                    free_at = free_at.max(now) + work;
                    events.push(Reverse((free_at, Event::Answer(sent.len() as u64))));
                    sent.push(Some(statement));
                }
                Output::Conclusion { ticket, conclusion, .. } => {
                    concluded.push((tickets.remove(&ticket).unwrap(), conclusion));
                }
                Output::CountRegistry => {}
                Output::Wait(until) => {
                    events.extend(until.map(|until| Reverse((until.max(now + Duration::from_millis(1)), Event::Wake))));
                    break;
                }
            }
        }
        for (device, conclusion) in concluded {
            let index = usize::try_from(device).unwrap();
            match conclusion.decision {
                Decision::Admitted(_) => {
                    let member = Member {
                        device: id(device.into()),
                        kind: Kind::of(Some("cam"), Some(firmware(device))),
                    };
                    node.connect.proving_mut().handle_opened(member, now);
                    node.sessions += 1;
                    left -= 1;
                    admitted[index] = Some(now.as_micros() as f64 / 1e6);
                }
                Decision::Refused(refusal) => {
                    let hint = refusal.hint.unwrap();
                    events.push(Reverse((now + hint.after, Event::Arrive(device))));
                }
                Decision::Restricted(_) => unreachable!("there are no rules"),
            }
        }
    }
    admitted.into_iter().map(Option::unwrap).collect()
}

fn t99(times: impl IntoIterator<Item = f64>) -> f64 {
    let mut times: Vec<f64> = times.into_iter().collect();
    times.sort_by(f64::total_cmp);
    times[times.len() * 99 / 100]
}

#[test]
fn whole_fleet_that_returns_with_a_new_version_is_not_slowed() {
    // A fiftieth was not upgraded.
    let firmware = |device: u64| if device.is_multiple_of(50) { "1" } else { "2" };

    let (limited, free) = (storm(15_000, true, firmware), storm(15_000, false, firmware));

    let (limited, free) = (t99(limited), t99(free));
    println!(
        "t99 {limited:.2} s, {free:.2} s without the limit: {:.3}x",
        limited / free
    );
    assert!(limited <= 1.1 * free, "{limited} {free}");
}

#[test]
fn half_of_a_fleet_with_a_new_version_waits_for_the_verdict_and_delays_nobody() {
    let firmware = |device: u64| if device.is_multiple_of(2) { "1" } else { "2" };
    let half = |times: &[f64], is_new: usize| t99(times.iter().skip(is_new).step_by(2).copied());

    let (limited, free) = (storm(15_000, true, firmware), storm(15_000, false, firmware));

    let (old, new) = (half(&limited, 0), half(&limited, 1));
    println!(
        "t99 {old:.2} s with the old version, {:.2} s without the limit; {new:.1} s with the new one",
        half(&free, 0)
    );
    assert!(old <= half(&free, 0), "{old}");
    assert!((120.0..150.0).contains(&new), "{new}");
}
