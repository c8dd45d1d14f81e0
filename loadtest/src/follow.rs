//! Follows what a server publishes about devices: its event stream and its counts, each on a thread of its own.
//!
//! The one type to read is [`Follower`]. [`Comparison`](crate::recorder::presence::Comparison) decides.

use std::{
    collections::BTreeMap,
    io::BufRead,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::Deserialize;
use uuid::Uuid;

use crate::{
    metrics::Ops,
    plan::Device,
    recorder::{Recorder, presence::State},
};

/// How often the counts are asked for.
const COUNT_EVERY: Duration = Duration::from_secs(1);
/// Time until a stream that broke is opened again.
const REOPEN_AFTER: Duration = Duration::from_millis(200);
/// Longest wait for the first stream.
const OPEN_TIME_MAX: Duration = Duration::from_secs(10);

/// Follows until it is dropped. The thread of the stream ends with the stream.
#[derive(Debug)]
pub struct Follower {
    ends: Arc<AtomicBool>,
}

/// What of an event is read.
#[derive(Debug, Deserialize)]
struct Published {
    #[serde(rename = "type")]
    kind: String,
    device: Option<Uuid>,
    state: Option<String>,
}

impl Follower {
    /// Returns once the stream is open, so that no later event is missed.
    /// `has_counts`: the server knows no devices but these.
    ///
    /// # Errors
    /// There is no stream.
    pub async fn start(ops: &Ops, devices: &[Device], recorder: &Arc<Recorder>, has_counts: bool) -> Result<Self> {
        let ends = Arc::new(AtomicBool::new(false));
        let places: BTreeMap<Uuid, usize> = devices.iter().enumerate().map(|(at, device)| (device.id, at)).collect();
        let (opened, is_open) = mpsc::channel();
        std::thread::spawn({
            let (ops, recorder, ends) = (ops.clone(), Arc::clone(recorder), Arc::clone(&ends));
            move || read_events(&ops, &places, &recorder, &ends, &opened)
        });
        if has_counts {
            std::thread::spawn({
                let (ops, recorder, ends) = (ops.clone(), Arc::clone(recorder), Arc::clone(&ends));
                move || read_counts(&ops, &recorder, &ends)
            });
        }
        let follower = Self { ends };
        tokio::task::spawn_blocking(move || is_open.recv_timeout(OPEN_TIME_MAX))
            .await
            .context("the task that waits for the stream")?
            .context("the server opens no stream of events")?;
        Ok(follower)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

fn read_counts(ops: &Ops, recorder: &Recorder, ends: &AtomicBool) {
    while !ends.load(Ordering::Relaxed) {
        let started = Instant::now();
        // A server that is frozen answers nothing, and one without counts has nothing to compare.
        if let Ok(counts) = ops.presence()
            && started.elapsed() < COUNT_EVERY
        {
            recorder.counted(counts, Instant::now());
        }
        std::thread::sleep(COUNT_EVERY.saturating_sub(started.elapsed()));
    }
}

fn read_events(
    ops: &Ops,
    places: &BTreeMap<Uuid, usize>,
    recorder: &Recorder,
    ends: &AtomicBool,
    opened: &mpsc::Sender<()>,
) {
    let mut last_id: Option<String> = None;
    while !ends.load(Ordering::Relaxed) {
        if let Ok(mut stream) = ops.events(last_id.as_deref()) {
            let mut line = String::new();
            while stream.read_line(&mut line).is_ok_and(|bytes| bytes > 0) && !ends.load(Ordering::Relaxed) {
                // The first line greets: from now on no event is missed.
                let _ = opened.send(());
                let text = line.trim_end();
                if let Some(id) = text.strip_prefix("id:") {
                    last_id = Some(id.trim().to_owned());
                } else if let Some(data) = text.strip_prefix("data:") {
                    handle(data.trim(), places, recorder, || ops.unknown_devices());
                }
                line.clear();
            }
        }
        std::thread::sleep(REOPEN_AFTER);
    }
}

/// An event that is not about presence, or about another device, is passed over.
/// `unknown`: asks for the devices that are listed as unknown.
fn handle(
    data: &str,
    places: &BTreeMap<Uuid, usize>,
    recorder: &Recorder,
    unknown: impl FnOnce() -> Result<Vec<Uuid>>,
) {
    let Ok(event) = serde_json::from_str::<Published>(data) else {
        return;
    };
    let now = Instant::now();
    match event.kind.as_str() {
        "presence" => {
            let state = match event.state.as_deref() {
                Some("online") => State::Online,
                Some("offline") => State::Offline,
                Some("unknown") => State::Unknown,
                _ => return,
            };
            if let Some(place) = event.device.and_then(|device| places.get(&device)) {
                recorder.published(*place, state, now);
            }
        }
        "presence_group" => {
            // A server that does not answer says nothing new.
            if let Ok(unknown) = unknown() {
                let unknown = unknown.iter().filter_map(|device| places.get(device).copied());
                let is_held = event.state.as_deref() == Some("held");
                recorder.group_published(is_held, &unknown.collect(), now);
            }
        }
        "missed" => recorder.missed(),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Counters;

    #[test]
    fn published_states_reach_the_record_of_their_device() {
        let now = Instant::now();
        let (known, other) = (Uuid::from_u128(7), Uuid::from_u128(8));
        let places = BTreeMap::from([(known, 0)]);
        let recorder = Recorder::new(&["1"], &BTreeMap::new(), now).comparing(Duration::from_secs(80));
        recorder.begin_phase(now, Counters::default());
        recorder.due(0, now, true);
        recorder.handle(0, crate::recorder::Event::Connected, now);

        for data in [
            format!(r#"{{"id":1,"at":"x","type":"presence","device":"{known}","state":"offline","reason":"reset"}}"#),
            format!(r#"{{"type":"presence","device":"{other}","state":"offline"}}"#),
            format!(r#"{{"type":"presence","device":"{known}","state":"unknown","reason":"path"}}"#),
            r#"{"type":"presence_group","group":"node","state":"held","device":null}"#.to_owned(),
            r#"{"type":"presence_group","group":"node","state":"released"}"#.to_owned(),
            r#"{"type":"missed"}"#.to_owned(),
            r#"{"type":"alarm","state":"raised"}"#.to_owned(),
            "no JSON".to_owned(),
        ] {
            let listed = if data.contains("held") {
                vec![known, other]
            } else {
                Vec::new()
            };
            handle(&data, &places, &recorder, || Ok(listed));
        }

        let total = recorder.presence(now).unwrap();
        assert_eq!((total.false_offline, total.unknown), (1, 1));
        assert_eq!((total.groups, total.missed), (1, 1));
    }
}
