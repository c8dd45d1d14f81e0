//! Presence of 100,000 devices on a node that stands still: no living device is called offline, and the dead ones are
//! found.

use std::time::Duration;

use loadtest::{
    report::Presence,
    scenario::Scenario,
    simulate::sessions::{Publisher, watch},
};

use super::FLEET;

const NAIVE: Publisher = Publisher::Naive {
    heartbeat: Duration::from_secs(30),
    deadline: Duration::from_secs(90),
};
/// Sockets per second that the node reads: enough, and so few that it is always 50 s behind.
const READS_PER_SECOND: [f64; 2] = [ENOUGH, 2_000.0];
const ENOUGH: f64 = 20_000.0;
/// Between the thaw and the end: deadline and grace, and the longest backlog.
const AFTER: u32 = 110 + 90;

/// The gateway's defaults: pings every 30 s, deadline 90 s. In the freeze 0.1 % of the devices lose their power, and as
/// many leave.
fn frozen(seconds: u32) -> Scenario {
    let per_second = f64::from(FLEET) / 1_000.0 / f64::from(seconds);
    let text = format!(
        "name = \"frozen\"\nabout = \"\"\ndevices = {FLEET}\ncapacity_per_second = 1\nthresholds = [\"missing == 0\"]\n\
         [presence]\n[[fleet]]\nname = \"all\"\nfirmware = {{ a = 1.0 }}\n\
         [[phase]]\nname = \"connect\"\nseconds = 60\nuntil = \"connected\"\naction = {{ connect = {{ per_second = 5000 }} }}\n\
         [[phase]]\nname = \"calm\"\nseconds = 60\n\
         [[phase]]\nname = \"frozen\"\nseconds = {seconds}\naction = {{ gateway = \"frozen\" }}\n\
         power_cuts_per_second = {per_second}\ncloses_per_second = {per_second}\n\
         [[phase]]\nname = \"after\"\nseconds = {AFTER}\n"
    );
    toml::from_str(&text).unwrap()
}

fn published(seconds: u32, publisher: Publisher, reads_per_second: f64) -> Presence {
    let total = watch(&frozen(seconds), publisher, reads_per_second).unwrap().total;
    println!(
        "frozen {seconds} s, {reads_per_second} reads/s, {publisher:?}: false offline {}, closed {}, dead {} of {} in {:?} s",
        total.false_offline,
        total.sessions_closed_by_stall,
        total.true_offline,
        total.power_cuts,
        total.true_offline_seconds
    );
    total
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimisation")]
fn node_that_stands_still_calls_no_living_device_offline_and_finds_every_dead_one() {
    for seconds in [10, 30, 60, 90, 300] {
        for reads_per_second in READS_PER_SECOND {
            let total = published(seconds, Publisher::Seawall, reads_per_second);

            assert_eq!((total.false_offline, total.sessions_closed_by_stall), (0, 0));
            assert!(
                total.power_cuts > 50 && total.closed_offline == total.closes,
                "{total:?}"
            );
            // A node that is always behind does not trust itself, and calls nobody offline for silence.
            let is_found = total.true_offline == total.power_cuts && total.false_online_after == 0;
            assert!(reads_per_second < ENOUGH || is_found, "{total:?}");
        }
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimisation")]
fn heartbeats_stamped_when_they_are_processed_call_the_fleet_offline() {
    // Frozen seconds, and the least part of the fleet that is called offline at 20,000 and at 2,000 reads per second.
    for (seconds, least) in [(60, [0.0, 0.9]), (90, [0.9, 0.9]), (300, [0.99, 0.99])] {
        for (reads_per_second, least) in READS_PER_SECOND.into_iter().zip(least) {
            let total = published(seconds, NAIVE, reads_per_second);

            #[expect(clippy::cast_precision_loss, reason = "at most 100,000 devices")]
            let part = total.false_offline as f64 / f64::from(FLEET);
            assert!(part >= least, "{part} of the fleet, frozen {seconds} s");
        }
    }
}
