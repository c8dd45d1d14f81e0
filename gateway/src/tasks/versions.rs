//! Firmware versions that are new to the fleet: reads what is stored, judges the evidence once a second, stores what
//! changed, and tells operators. Start with [`follow`].

use std::{sync::atomic::Ordering, time::Duration};

use seawall_proto::{
    proving::{Change, PROVEN_AFTER, Tested, VersionState},
    rollout::Counts,
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    fleet::{alarms::quoted, cohorts::name_of, events::Body},
    node::{Shared, State},
    store::{StoreError, StoredVersion, StoredVersions},
};

/// Interval at which the evidence is judged.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time between two reads of stored changes.
const READ_INTERVAL: Duration = Duration::from_secs(10);
/// Time between two tries to store a change, or to read everything at the start.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum number of changes that wait for the database. Further ones are dropped: their versions are tested again
/// after a restart.
const WAITING_MAX: usize = 1_000;
/// The alarm while a version is limited because it was found worse.
const WORSE_ALARM: &str = "version_worse";
/// The alarm while devices wait for a verdict that does not come.
const WAITING_ALARM: &str = "version_waiting";

/// Follows the versions of the fleet, until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    if state.config.breaker.limit_unproven {
        tokio::select! {
            () = stop.cancelled() => {}
            () = run(&state) => {}
        }
    } else {
        stop.cancelled().await;
    }
}

async fn run(state: &Shared) {
    let stored = load(state).await;
    let (changes, waiting) = mpsc::channel(WAITING_MAX);
    // Apart: a slow database must not put off a verdict.
    tokio::join!(judge(state, changes), store(state, waiting, stored));
}

async fn judge(state: &State, changes: mpsc::Sender<Change>) {
    let mut refused = 0;
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for change in state.lookups.judge_versions() {
            announce(state, &change);
            if changes.try_send(change).is_err() {
                tracing::debug!("a firmware version is not stored: too many wait for the database");
            }
        }
        let (tested, refused_now) = state.lookups.tested_versions();
        state.metrics.version_refusals.increment(refused_now - refused);
        refused = refused_now;
        watch(state, &tested);
    }
}

/// Stores changes in order, and reads those of other nodes where none waits: what is stored may be older than what
/// waits.
async fn store(state: &State, mut waiting: mpsc::Receiver<Change>, mut stored: StoredVersions) {
    let mut is_seed_due = stored.is_young;
    let mut read_at = Instant::now() + READ_INTERVAL;
    loop {
        match timeout_at(read_at, waiting.recv()).await {
            Ok(Some(change)) => {
                while let Err(error) = write(state, &change).await {
                    tracing::debug!(%error, "a firmware version is not stored: trying again");
                    sleep(RETRY_INTERVAL).await;
                }
            }
            Ok(None) => return,
            Err(_) => {
                read_at = Instant::now() + READ_INTERVAL;
                let is_seeding = is_seed_due && state.is_presence_restored.load(Ordering::Relaxed);
                let read = if is_seeding {
                    seed(state).await
                } else {
                    state.store.versions_changed(stored.as_of).await
                };
                match read {
                    Ok(read) if waiting.is_empty() => {
                        state.lookups.handle_versions(&read);
                        is_seed_due &= !is_seeding;
                        stored = read;
                    }
                    Ok(_) => {}
                    Err(error) => tracing::debug!(%error, "stored firmware versions not read"),
                }
            }
        }
    }
}

/// Reads all that is stored.
async fn load(state: &State) -> StoredVersions {
    loop {
        match state.store.versions_load(&[]).await {
            Ok(stored) => {
                state.lookups.handle_versions(&stored);
                return stored;
            }
            Err(error) => tracing::debug!(%error, "stored firmware versions not read: trying again"),
        }
        sleep(RETRY_INTERVAL).await;
    }
}

/// Records the versions of all devices that a young fleet has by now. Later ones are recorded as they come.
async fn seed(state: &State) -> Result<StoredVersions, StoreError> {
    let (groups, _) = state.history.groups().all();
    let mut known: Vec<_> = groups
        .iter()
        .map(|(group, _)| (group.cohort.model.as_deref(), group.cohort.firmware.as_deref()))
        .collect();
    known.sort_unstable();
    known.dedup();
    state.store.versions_load(&known).await
}

/// Stores a change.
async fn write(state: &State, change: &Change) -> Result<(), StoreError> {
    let name = (change.model.as_deref(), change.firmware.as_deref());
    let found = state.store.version_write(name, change.before, change.after).await?;
    if found != change.after {
        // Another node, or a person, was faster.
        state.lookups.handle_version(&StoredVersion {
            model: change.model.clone(),
            firmware: change.firmware.clone(),
            state: found,
        });
    }
    Ok(())
}

/// Tells operators: event, log line.
fn announce(state: &State, change: &Change) {
    let cohort = name_of(change.model.as_deref(), change.firmware.as_deref());
    let (own, control) = change.evidence;
    let after = change.after.as_str();
    if change.after == VersionState::Worse {
        tracing::warn!(
            cohort,
            sessions = own.connects,
            failed = own.failed,
            control_sessions = control.connects,
            control_failed = control.failed,
            "firmware version found worse"
        );
    } else {
        tracing::info!(cohort, state = after, sessions = own.connects, "firmware version noted");
    }
    // A young fleet has many versions at once.
    if change.before.is_some() || change.after == VersionState::Unproven {
        state
            .events
            .notice(state.clock.wall(), Body::Version { cohort, state: after });
    }
}

/// Raises and ends the alarms.
fn watch(state: &State, tested: &[Tested]) {
    let of = |wanted: VersionState| tested.iter().filter(move |version| version.state == wanted);
    for (wanted, label) in [(VersionState::Unproven, "unproven"), (VersionState::Worse, "worse")] {
        let count = u32::try_from(of(wanted).count()).unwrap_or(u32::MAX);
        state.metrics.versions_tested.set(label, f64::from(count));
    }
    for version in of(VersionState::Worse) {
        let (name, own) = (name(version), version.evidence.0);
        let found = failed(own).unwrap_or_else(|| "no session of it has been counted since".to_owned());
        let detail = format!(
            "{name} was found worse than other versions, and {} of its devices are admitted at a time: {found}. It is released when its sessions last. Clear it if that is wrong",
            version.room
        );
        state
            .alarms
            .raise(WORSE_ALARM, &name, detail, Some(clear(version).into()));
    }
    for version in tested.iter().filter(|version| version.is_waiting) {
        let name = name(version);
        let detail = format!(
            "{} attempts with the new version {name} were refused, and its test has no verdict after 15 minutes: its sessions neither last nor fail clearly more often than others. Clear it if that is right for your devices",
            version.refused
        );
        state
            .alarms
            .raise(WAITING_ALARM, &name, detail, Some(clear(version).into()));
    }
    let is_any = |subject: &str, holds: &dyn Fn(&Tested) -> bool| {
        tested.iter().any(|version| holds(version) && name(version) == subject)
    };
    state.alarms.retain(WORSE_ALARM, |subject| {
        is_any(subject, &|version| version.state == VersionState::Worse)
    });
    state
        .alarms
        .retain(WAITING_ALARM, |subject| is_any(subject, &|version| version.is_waiting));
}

fn failed(counts: Counts) -> Option<String> {
    (counts.connects > 0).then(|| {
        format!(
            "{} of its last {} sessions ended within {} s",
            counts.failed,
            counts.connects,
            PROVEN_AFTER.as_secs()
        )
    })
}

fn name(version: &Tested) -> String {
    name_of(version.model.as_deref(), version.firmware.as_deref())
}

/// The command that clears a version.
fn clear(version: &Tested) -> String {
    let mut command = "seawall firmware clear".to_owned();
    if let Some(model) = &version.model {
        command.push_str(" --model=");
        command.push_str(&quoted(model));
    }
    if let Some(firmware) = &version.firmware {
        command.push_str(" -- ");
        command.push_str(&quoted(firmware));
    }
    command
}
