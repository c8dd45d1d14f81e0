//! Who is registered: read from the registry every so often, and kept in `roster.bin` of the data directory, so that this node tells devices
//! from strangers, and tenants from each other, from its first connection on.
//!
//! Nothing depends on it but places in the queue. A file that is missing, damaged or old costs devices that this node has not seen their
//! places until the registry is read, which never is in the way of look-ups. Start with [`follow`].

use std::{io, path::Path, sync::Arc, time::Duration};

use rand::Rng as _;
use seawall_proto::{
    admission::BreakerState,
    slots::{ROSTER_BYTES_MAX, ROSTER_MAX, Roster, RosterBuilder},
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    data_dir::{read_bounded, write_atomically},
    registry,
    state::{Shared, State},
};

/// The file, in the data directory: eight bytes a device. It is good for any node of the same registry.
pub const FILE: &str = "roster.bin";

/// How old a roster becomes, give or take [`AGE_SPREAD`]: devices that were registered through other nodes since, and did not connect here,
/// are strangers until then.
const AGE: Duration = Duration::from_mins(30);
/// Nodes that started together don't read together.
const AGE_SPREAD: f64 = 0.25;
/// Time between the end of one reading and the next at least, whoever asks.
const PAUSE_MIN: Duration = Duration::from_secs(5);
/// Between two pages, times what a page took: reading takes a fifth of one connection's time at most.
const PAGE_PAUSE_FACTOR: u32 = 4;
const PAGE_PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest page that is read at the usual pace. A page takes 0.5 ms at the database; one beyond this limit is costly there.
const PAGE_USUAL_MAX: Duration = Duration::from_millis(250);
/// The pause after a costly page, as a multiple of the page's time: reading takes 2 % of one connection's time.
const COSTLY_PAGE_PAUSE_FACTOR: u32 = 49;
/// After a page that could not be read.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// How often it is looked whether devices still wait.
const QUIET_LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A roster of this age is as good as none: in a crowd that never ends, devices that are registered meanwhile must not stay strangers.
const AGE_BLIND: Duration = Duration::from_hours(1);
/// A node whose roster is as good as none reads a page this often although devices wait: too many are strangers to it.
const BLIND_PAGE_INTERVAL: Duration = Duration::from_secs(1);

/// Asks for the registry to be read. Clones ask the same.
#[derive(Clone, Debug, Default)]
pub struct Wanted(Arc<Notify>);

impl Wanted {
    /// Many devices were registered, or may have been.
    pub fn ask(&self) {
        self.0.notify_one();
    }
}

/// What an earlier life kept; empty where it kept nothing. What can't be read is logged here, and counts as nothing.
#[must_use]
pub fn load(data_dir: &Path) -> Roster {
    let path = data_dir.join(FILE);
    match read_file(&path, ROSTER_BYTES_MAX) {
        Ok(roster) => return roster,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the roster of registered devices can't be read: until the registry is, devices that this node has not seen are strangers");
        }
    }
    Roster::empty()
}

/// A file that is longer than any roster is not read.
fn read_file(path: &Path, bytes_max: u64) -> io::Result<Roster> {
    Roster::from_bytes(&read_bounded(path, bytes_max)?).map_err(io::Error::other)
}

/// Reads the registry at the start, when the roster has become old, and whenever asked, until `stop`.
pub async fn follow(state: Shared, stop: CancellationToken) {
    let work = async {
        state.store.ready().await;
        // Whatever the file said: it may be a copy from a node of another registry.
        let mut due = Instant::now();
        let mut is_failing = false;
        loop {
            // Asked or due.
            let _ = timeout(
                due.saturating_duration_since(Instant::now()),
                state.roster_wanted.0.notified(),
            )
            .await;
            let Some(roster) = read(&state).await.map(Arc::new) else {
                sleep(RETRY_PAUSE).await;
                continue;
            };
            tracing::debug!(devices = roster.len(), "the registered devices were read");
            if !registry::may_believe(&state, roster.len()).await {
                // What was known stays, here and on disk, to judge the registry by.
                sleep(PAUSE_MIN).await;
                due = Instant::now() + age_max();
                continue;
            }
            state.gate.set_roster(Arc::clone(&roster));
            state.registry.handle_roster();
            let data_dir = state.config.server.data_dir.clone();
            let kept = tokio::task::spawn_blocking(move || keep(&data_dir, &roster)).await;
            let kept = kept.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            if let Err(error) = &kept
                && !is_failing
            {
                tracing::warn!(%error, "the roster of registered devices can't be kept on disk");
            }
            is_failing = kept.is_err();
            sleep(PAUSE_MIN).await;
            due = Instant::now() + age_max();
        }
    };
    // Endless: dropped with the gateway.
    let _: Option<std::convert::Infallible> = stop.run_until_cancelled(work).await;
}

/// Time since the registry was as the roster says; since the start where there is none.
#[must_use]
pub fn age(state: &State) -> Duration {
    let roster = state.gate.roster();
    let is_none = roster.as_of() == Roster::empty().as_of();
    let since = if is_none { state.started } else { roster.as_of() };
    state.clock.wall().saturating_since(since)
}

/// The pause after a page, by the time that it took.
fn page_pause(took: Duration) -> Duration {
    let factor = if took > PAGE_USUAL_MAX {
        COSTLY_PAGE_PAUSE_FACTOR
    } else {
        PAGE_PAUSE_FACTOR
    };
    (took * factor).max(PAGE_PAUSE_MIN)
}

fn age_max() -> Duration {
    AGE.mul_f64(rand::rng().random_range(1.0 - AGE_SPREAD..=1.0 + AGE_SPREAD))
}

fn keep(data_dir: &Path, roster: &Roster) -> io::Result<()> {
    write_atomically(&data_dir.join(FILE), &roster.to_bytes(), 0o600)
}

/// Reads the whole registry, however long it takes. `None`: what was read is lost, by a bug.
async fn read(state: &State) -> Option<Roster> {
    let mut builder = RosterBuilder::new(rand::random());
    quiet(state).await;
    let as_of = state.clock.wall();
    let mut cursor = None;
    loop {
        let begun = Instant::now();
        let page = match state.store.roster_page(cursor.as_ref()).await {
            Ok(page) => page,
            Err(error) => {
                tracing::debug!(%error, "a page of the registered devices can't be read: trying again");
                sleep(RETRY_PAUSE).await;
                quiet(state).await;
                continue;
            }
        };
        let has_room = page.items.iter().all(|row| builder.add(row.device, &row.tenant));
        if !has_room {
            tracing::warn!(
                devices_max = ROSTER_MAX,
                "more devices are registered than a node tells from strangers before it has seen them"
            );
            break;
        }
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
        sleep(page_pause(begun.elapsed())).await;
        quiet(state).await;
    }
    // Sorting the largest takes a second.
    let finish = move || builder.finish(as_of);
    let finished = tokio::task::spawn_blocking(finish).await;
    finished
        .inspect_err(|error| tracing::error!(%error, "the registered devices were read and could not be sorted"))
        .ok()
}

/// Waits until look-ups leave the database time for a page.
async fn quiet(state: &State) {
    let begun = Instant::now();
    loop {
        let admission = state.gate.state();
        let is_there = admission.breaker == BreakerState::Closed && state.store.state().status.is_answering();
        let is_turn_of_blind = begun.elapsed() >= BLIND_PAGE_INTERVAL && is_blind(&state.gate.roster(), age(state));
        if is_there && (admission.has_time_to_spare() || is_turn_of_blind) {
            return;
        }
        sleep_until(Instant::now() + QUIET_LOOK_INTERVAL).await;
    }
}

/// Whether a roster of this age is as good as none.
fn is_blind(roster: &Roster, age: Duration) -> bool {
    roster.is_empty() || age >= AGE_BLIND
}

#[cfg(test)]
mod tests {
    use std::fs;

    use seawall_proto::{id::DeviceId, slots::TenantTag, time::WallTime};

    use super::*;

    const WALL: WallTime = WallTime::from_unix_ms(1_800_000_000_000);

    fn device() -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(1))
    }

    fn roster() -> Roster {
        let mut builder = RosterBuilder::new([1; 16]);
        assert!(builder.add(device(), "acme"));
        builder.finish(WALL)
    }

    #[test]
    fn what_was_kept_is_read_back() {
        let home = tempfile::tempdir().unwrap();
        assert!(load(home.path()).is_empty());

        keep(home.path(), &Roster::empty()).unwrap();
        keep(home.path(), &roster()).unwrap();

        let loaded = load(home.path());
        assert_eq!(loaded.tenant_of(device()), Some(TenantTag::of("acme")));
        assert_eq!(loaded.as_of(), WALL);
    }

    #[test]
    fn file_that_holds_no_roster_counts_as_none() {
        let home = tempfile::tempdir().unwrap();
        let whole = roster().to_bytes();
        for content in [&[][..], b"roster", &whole[..whole.len() - 1], &[0; 4_096]] {
            fs::write(home.path().join(FILE), content).unwrap();

            assert!(load(home.path()).is_empty());
        }
    }

    #[test]
    fn reading_the_registry_takes_a_fifth_of_a_connections_time_and_a_fiftieth_where_pages_are_costly() {
        let millis = Duration::from_millis;

        assert_eq!(page_pause(millis(1)), millis(10));
        assert_eq!(page_pause(millis(250)), millis(1_000));
        assert_eq!(page_pause(millis(251)), millis(251 * 49));
    }

    #[test]
    fn file_that_is_longer_than_any_roster_is_not_read() {
        let home = tempfile::tempdir().unwrap();
        keep(home.path(), &roster()).unwrap();
        let path = home.path().join(FILE);
        let len = fs::metadata(&path).unwrap().len();

        assert_eq!(read_file(&path, len).unwrap().len(), 1);
        assert!(read_file(&path, len - 1).is_err());
    }

    #[test]
    fn devices_that_wait_do_not_hold_up_the_reading_where_there_is_no_roster_or_one_an_hour_old() {
        let minutes = Duration::from_mins;

        assert!(is_blind(&Roster::empty(), Duration::ZERO));
        assert!(!is_blind(&roster(), minutes(59)));
        assert!(is_blind(&roster(), minutes(60)));
    }
}
