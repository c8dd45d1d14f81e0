//! What must hold at every moment, as claims that a run ends at when one fails.
//!
//! Each takes what it judges as arguments and costs constant time, so that it can be asked after every event, and shown a world that
//! breaks it. [`Ledger`] is the simulator's own count of what a node was asked and has answered: admission's figures are held against it.

use std::{collections::BTreeSet, time::Duration};

use seawall_proto::{
    admission::{AdmissionConfig, AdmissionState, Batch, BreakerState, STATEMENTS_IN_FLIGHT_MAX},
    slots::{HINT_FAR_MIN, HINT_MAX, HINT_MIN},
    time::Instant,
};

/// Every device is answered in less (docs/PROTOCOL.md).
const ANSWER_BELOW: Duration = Duration::from_secs(3);
/// Told slots are whole milliseconds, of two clocks.
const SLOT_ROUNDING: Duration = Duration::from_millis(2);
/// Keys of one second that the ceiling allows, as a part of its rate.
const CEILING_SLACK: f64 = 1.1;

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{claim}: {found}")]
pub struct Violation {
    /// What should hold.
    pub claim: &'static str,
    pub found: String,
}

fn claim(holds: bool, claim: &'static str, found: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds {
        Ok(())
    } else {
        Err(Violation { claim, found: found() })
    }
}

/// One node's requests, and what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    pub arrived: u64,
    pub admitted: u64,
    pub refused: u64,
    /// The device hung up.
    pub abandoned: u64,
    /// Not answered yet.
    pub waiting: usize,
    /// Keys sent to the database and not answered.
    pub in_flight: usize,
    pub statements_in_flight: usize,
    /// Keys sent in the current second.
    pub keys_this_second: u64,
}

impl Ledger {
    /// After every event at a node: its figures agree with ours, and with its settings.
    ///
    /// # Errors
    /// The first claim that fails.
    pub fn check(&self, state: &AdmissionState, config: &AdmissionConfig) -> Result<(), Violation> {
        let (answered, waiting) = (self.admitted + self.refused + self.abandoned, self.waiting);
        claim(
            self.arrived == answered + waiting as u64,
            "every request is answered, abandoned or waiting",
            || format!("{self:?}"),
        )?;
        claim(state.queue == waiting, "the node knows who waits", || {
            format!("{} by its count, {waiting} by ours", state.queue)
        })?;
        claim(waiting <= config.waiting_max, "no more wait than waiting_max", || {
            format!("{waiting} of {}", config.waiting_max)
        })?;
        let in_flight = self.in_flight;
        claim(
            usize::try_from(state.in_flight) == Ok(in_flight),
            "the node knows what is in flight",
            || format!("{} by its count, {in_flight} by ours", state.in_flight),
        )?;
        claim(
            state.in_flight <= config.keys_in_flight_max && state.in_flight <= state.limit,
            "keys in flight never exceed the limit",
            || format!("{in_flight} of {}, at most {}", state.limit, config.keys_in_flight_max),
        )?;
        claim(
            state.breaker == BreakerState::Closed || waiting == 0,
            "nobody waits for a database that is away",
            || format!("{waiting} wait, breaker {}", state.breaker.as_str()),
        )
    }

    /// Once a second: the ceiling on keys was kept.
    ///
    /// # Errors
    /// It was not.
    pub fn check_second(&mut self, config: &AdmissionConfig) -> Result<(), Violation> {
        let keys = std::mem::take(&mut self.keys_this_second);
        let most = f64::from(config.lookups_per_second_max) * CEILING_SLACK + 1.0;
        #[expect(clippy::cast_precision_loss, reason = "keys of a second are far below 2^52")]
        let holds = keys as f64 <= most;
        claim(holds, "no second has more keys than the ceiling allows", || {
            format!("{keys} keys, {most} are allowed")
        })
    }
}

/// A statement is about to be sent for some devices, of which `blocked` are refused by a rule of this node.
///
/// # Errors
/// There is such a device.
pub fn none_blocked(blocked: usize) -> Result<(), Violation> {
    claim(blocked == 0, "no blocked device is looked up", || {
        format!("{blocked} devices")
    })
}

/// A statement is about to be sent, where `before` is the state from before it was taken.
///
/// # Errors
/// The statement is empty, too large, names a key twice, or is one too many.
pub fn statement(
    batch: &Batch,
    before: &AdmissionState,
    running: usize,
    config: &AdmissionConfig,
) -> Result<(), Violation> {
    let keys = batch.keys.len();
    claim(
        (1..=usize::try_from(config.batch_keys_max).unwrap_or(usize::MAX)).contains(&keys),
        "a statement has 1 to batch_keys_max keys",
        || format!("{keys} keys"),
    )?;
    claim(
        batch.keys.iter().collect::<BTreeSet<_>>().len() == keys,
        "a statement names no key twice",
        || format!("{keys} keys"),
    )?;
    claim(
        running < STATEMENTS_IN_FLIGHT_MAX,
        "no more statements than three are under way",
        || format!("{running} before this one"),
    )?;
    let in_flight = usize::try_from(before.in_flight).unwrap_or(usize::MAX) + keys;
    claim(
        in_flight <= usize::try_from(before.limit).unwrap_or(usize::MAX),
        "what is sent stays within the limit",
        || format!("{in_flight} in flight, limit {}", before.limit),
    )?;
    claim(
        before.breaker == BreakerState::Closed || batch.is_probe,
        "only probes are sent while the breaker is open",
        || format!("{keys} keys, breaker {}", before.breaker.as_str()),
    )
}

/// Virtual time advances.
///
/// # Errors
/// It went back.
pub fn time(now: Instant, next: Instant) -> Result<(), Violation> {
    claim(next >= now, "time never goes back", || {
        format!("from {} to {} us", now.as_micros(), next.as_micros())
    })
}

/// A device that arrived then is answered now.
///
/// # Errors
/// It waited too long.
pub fn answer(arrived: Instant, now: Instant) -> Result<(), Violation> {
    let waited = now.saturating_since(arrived);
    claim(waited < ANSWER_BELOW, "every device is answered in under 3 s", || {
        format!("after {waited:?}")
    })
}

/// The hint of a slot.
///
/// # Errors
/// It is out of the bounds of docs/PROTOCOL.md, "Slots".
pub fn slot_hint(after: Duration) -> Result<(), Violation> {
    claim(
        (HINT_MIN..=HINT_MAX).contains(&after),
        "a slot's hint is 0.5 to 600 s",
        || format!("{after:?}"),
    )
}

/// A device that showed its slot was given another. `promised`: the time it was told before, if that was its slot's.
///
/// # Errors
/// The new one is earlier.
pub fn slot_kept(promised: Option<Instant>, told: Instant) -> Result<(), Violation> {
    let Some(promised) = promised else {
        return Ok(());
    };
    claim(told + SLOT_ROUNDING >= promised, "a slot is never shortened", || {
        format!("from {} to {} us", promised.as_micros(), told.as_micros())
    })
}

/// What a device was promised by this hint: nothing that can be held against a later one where the hint was not its slot.
#[must_use]
pub fn promise(after: Duration, now: Instant) -> Option<Instant> {
    (after < HINT_FAR_MIN).then(|| now + after)
}

/// A node answers a request: it was waiting until now.
///
/// # Errors
/// It was answered before, or never asked.
pub fn answered_once<T>(waiting: Option<T>, ticket: &impl std::fmt::Debug) -> Result<T, Violation> {
    waiting.ok_or_else(|| Violation {
        claim: "every request is answered once",
        found: format!("{ticket:?}"),
    })
}

/// A device is admitted.
///
/// # Errors
/// It is in already.
pub fn admitted_once(is_connected: bool, device: usize) -> Result<(), Violation> {
    claim(!is_connected, "one admission a device", || format!("device {device}"))
}

/// Number of devices that were due in a past second and were not woken.
///
/// # Errors
/// There are any.
pub fn none_forgotten(overdue: u64) -> Result<(), Violation> {
    claim(overdue == 0, "no device is forgotten", || {
        format!("{overdue} are overdue")
    })
}

/// A device's machine is as it was after the last event that concerned it.
///
/// # Errors
/// It is not.
pub fn unchanged(device: usize, is_unchanged: bool) -> Result<(), Violation> {
    claim(is_unchanged, "only events change a device", || {
        format!("device {device}")
    })
}

/// The recorder and the machine of a device agree on whether it is connected.
///
/// # Errors
/// They differ.
pub fn recorder_agrees(device: usize, is_online: bool, is_connected: bool) -> Result<(), Violation> {
    claim(
        is_online == is_connected,
        "recorder and devices agree on who is connected",
        || format!("device {device}: online {is_online}, connected {is_connected}"),
    )
}

/// The recorder's number of connected devices, and a count of all.
///
/// # Errors
/// They differ.
pub fn counts_add_up(by_recorder: u64, counted: u64) -> Result<(), Violation> {
    claim(by_recorder == counted, "the sum of devices is their number", || {
        format!("{by_recorder} by the recorder, {counted} counted")
    })
}
