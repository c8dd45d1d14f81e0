//! The node's event buffer: numbered events for readers of `GET /api/v1/events`.
//!
//! Two rings share one sequence of numbers. Notices (presence, rules, alarms) push out the oldest when their ring is
//! full. Messages from devices were acknowledged, so one that nobody had time to read is never pushed out: while the
//! ring is full of young messages, new ones are not taken, and the device gets no acknowledgement.

use std::{
    borrow::Cow,
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use seawall_proto::{
    id::{DeviceId, Label, RuleId},
    presence::{Known, groups},
    session::{Payload, Received},
    time::{Instant, WallTime},
};
use serde::{Serialize, ser::SerializeMap};
use serde_json::value::RawValue;
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    fleet::history::groups::Group,
    store::{EvidenceText, PresenceState, cause_of},
};

/// Notices kept. The oldest goes when a new one comes (`seawall_dropped_total{buffer="events"}` counts what a reader
/// missed).
pub const NOTICES_MAX: usize = 8_192;
/// Messages kept.
pub const MESSAGES_MAX: usize = 8_192;
/// Most bytes of payload kept.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// A message this old has been readable long enough to make room for a new one.
pub const MESSAGE_KEPT_AT_LEAST: Duration = Duration::from_secs(10);

/// Numbers set aside for each second that a process may have run before the next start: more events than that a second,
/// all the time, there can't be.
const IDS_PER_SECOND: u64 = 1_000_000;

/// Something that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// Increases by one. A restart continues with greater numbers, so that a returning reader notices gaps. Below 2^53.
    pub id: u64,
    #[serde(serialize_with = "rfc3339")]
    pub at: WallTime,
    /// Monotonic time at which a message was taken; zero for notices. Spans come from it: the wall clock may be set.
    #[serde(skip)]
    taken: Instant,
    #[serde(flatten)]
    pub body: Body,
}

impl Event {
    /// Bytes of payload in it.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        self.body.payload_len()
    }
}

/// Names of all events.
pub const NAMES: [&str; 10] = [
    "presence",
    "presence_group",
    "rules",
    "rollout",
    "alarm",
    "proposal",
    "version",
    "drain",
    "eviction",
    "message",
];

/// What happened. The tag is the SSE event name.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Body {
    /// A device came online or went offline on this node, or it is not known whether it is.
    Presence {
        device: DeviceId,
        #[serde(skip_serializing_if = "Option::is_none")]
        external_id: Option<Label>,
        /// Written as `state`, `since`, `epoch`, `cause` and `evidence`. Of two events of a device the one with the
        /// greater epoch is the newer, as text as well.
        #[serde(flatten, serialize_with = "known_fields")]
        known: Known,
        /// The node that says so.
        node: Arc<str>,
        reason: &'static str,
        /// Written as tenant and cohort: formatted for readers, not once for each device that comes or goes.
        #[serde(flatten, serialize_with = "tenant_and_cohort")]
        group: Arc<Group>,
    },
    /// Many devices of a group went silent together and are held: they may be offline, or out of sight. Or they were
    /// heard again.
    PresenceGroup(Box<GroupNotice>),
    /// A rule was created, changed or deleted, or a revision came from another node.
    Rules {
        revision: u64,
        rule: Option<RuleId>,
        change: &'static str,
    },
    /// A staged change of a rule took a step.
    Rollout {
        rule: RuleId,
        direction: &'static str,
        state: &'static str,
        /// Number of stages reached.
        stage: u8,
        /// Share of the matched devices that is treated.
        percent: u8,
        verdict: &'static str,
    },
    /// Something that a person should look at, or its end.
    Alarm(Box<AlarmNotice>),
    /// A proposal of the cohort breaker is new, or its state changed.
    Proposal {
        proposal: Uuid,
        cohort: String,
        signal: &'static str,
        state: &'static str,
        rule: Option<RuleId>,
    },
    /// A firmware version is new to the fleet, is proven, or was found worse than others.
    Version {
        /// `model/version`, as devices claim it.
        cohort: String,
        /// `proven`, `unproven` or `worse`.
        state: &'static str,
    },
    /// The drain started, ended, or was cancelled.
    Drain { state: &'static str },
    /// The node began to close the sessions that rules evict, other sessions joined them, or it has ended.
    Eviction {
        /// `started`, `changed` or `ended`.
        state: &'static str,
        /// Sessions to close; 0 at the end.
        sessions: usize,
        rate_per_second: f64,
    },
    /// A message from a device. A plain session's text is a JSON string in `payload`, its binary data stands in
    /// `payload_base64`.
    Message {
        device: DeviceId,
        #[serde(skip_serializing_if = "Option::is_none")]
        external_id: Option<Label>,
        #[serde(skip_serializing_if = "Option::is_none")]
        message: Option<Box<str>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        topic: Option<Box<str>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        payload: Option<Arc<RawValue>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        payload_base64: Option<Box<str>>,
    },
}

/// What has become of devices that went silent together. It stands for the `presence` events of all of them that become
/// unknown, and of those that are heard again at once.
#[derive(Debug, Clone, Serialize)]
pub struct GroupNotice {
    #[serde(skip)]
    pub of: groups::Group,
    /// `node`, `tenant`, `address_block` or `site`.
    pub group: &'static str,
    /// The tenant, the block or the address; empty for the node.
    pub key: String,
    /// `held`, `resolving` or `released`.
    pub state: &'static str,
    pub cause: &'static str,
    /// Members when it was held, silent and not.
    pub members: u32,
    /// Members that were held, all in all.
    pub held: u32,
    /// Those that have been heard again.
    pub resolved: u32,
    /// Those that are still held.
    pub unknown: u32,
    /// Tenants of the members that were held. Left out if there are more than 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenants: Option<BTreeSet<Arc<str>>>,
}

impl GroupNotice {
    #[must_use]
    pub fn new(held: &groups::Held, state: &'static str) -> Self {
        Self {
            of: held.group.clone(),
            group: held.group.kind().as_str(),
            key: held.group.key(),
            state,
            cause: held.cause.as_str(),
            members: held.members,
            held: held.held,
            resolved: held.resolved,
            unknown: held.left,
            tenants: held.tenants.clone(),
        }
    }

    /// Whether it may concern devices of `tenant`.
    #[must_use]
    pub fn concerns(&self, tenant: &str) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.contains(tenant))
    }
}

/// The beginning or the end of an alarm. In a box: there are few, and every event has room for the largest.
#[derive(Debug, Clone, Serialize)]
pub struct AlarmNotice {
    pub kind: &'static str,
    pub subject: String,
    pub severity: &'static str,
    /// `raised` or `cleared`.
    pub state: &'static str,
    /// RFC 3339.
    pub since: String,
    pub detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<Cow<'static, str>>,
}

impl Body {
    /// The SSE event name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Presence { .. } => "presence",
            Self::PresenceGroup(_) => "presence_group",
            Self::Rules { .. } => "rules",
            Self::Rollout { .. } => "rollout",
            Self::Alarm(_) => "alarm",
            Self::Proposal { .. } => "proposal",
            Self::Version { .. } => "version",
            Self::Drain { .. } => "drain",
            Self::Eviction { .. } => "eviction",
            Self::Message { .. } => "message",
        }
    }

    /// The device that it is about.
    #[must_use]
    pub const fn device(&self) -> Option<DeviceId> {
        match self {
            Self::Presence { device, .. } | Self::Message { device, .. } => Some(*device),
            Self::PresenceGroup(_)
            | Self::Rules { .. }
            | Self::Rollout { .. }
            | Self::Alarm(_)
            | Self::Proposal { .. }
            | Self::Version { .. }
            | Self::Drain { .. }
            | Self::Eviction { .. } => None,
        }
    }

    /// The group of the device that it is about; `None` if it does not say it.
    #[must_use]
    pub fn group(&self) -> Option<&Group> {
        match self {
            Self::Presence { group, .. } => Some(group),
            Self::PresenceGroup(_)
            | Self::Message { .. }
            | Self::Rules { .. }
            | Self::Rollout { .. }
            | Self::Alarm(_)
            | Self::Proposal { .. }
            | Self::Version { .. }
            | Self::Drain { .. }
            | Self::Eviction { .. } => None,
        }
    }

    fn payload_len(&self) -> usize {
        match self {
            Self::Message {
                payload,
                payload_base64,
                ..
            } => {
                payload.as_ref().map_or(0, |json| json.get().len())
                    + payload_base64.as_ref().map_or(0, |text| text.len())
            }
            Self::Presence { .. }
            | Self::PresenceGroup(_)
            | Self::Rules { .. }
            | Self::Rollout { .. }
            | Self::Alarm(_)
            | Self::Proposal { .. }
            | Self::Version { .. }
            | Self::Drain { .. }
            | Self::Eviction { .. } => 0,
        }
    }
}

/// A message was not taken: the buffer is full of messages that are too young to drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the event buffer is full")]
pub struct BufferFull;

/// The buffer.
#[derive(Debug)]
pub struct Events {
    rings: Mutex<Rings>,
    newest: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Rings {
    last_id: u64,
    notices: VecDeque<Arc<Event>>,
    messages: VecDeque<Arc<Event>>,
    message_bytes: usize,
}

/// What a reader gets.
#[derive(Debug)]
pub struct Page {
    pub events: Vec<Arc<Event>>,
    /// Events after the reader's last one that are no longer there.
    pub missed: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self::new(WallTime::default())
    }
}

impl Events {
    /// `boot` makes numbers of a later start greater than those of an earlier one: wall-clock time of the start.
    #[must_use]
    pub fn new(boot: WallTime) -> Self {
        let last_id = boot.as_unix_ms() / 1_000 * IDS_PER_SECOND;
        Self {
            rings: Mutex::new(Rings {
                last_id,
                ..Rings::default()
            }),
            newest: watch::Sender::new(last_id),
        }
    }

    /// Publishes a notice. Evicts the oldest when full.
    pub fn notice(&self, at: WallTime, body: Body) {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.last_id += 1;
        let id = rings.last_id;
        if rings.notices.len() == NOTICES_MAX {
            rings.notices.pop_front();
        }
        let taken = Instant::ZERO;
        rings.notices.push_back(Arc::new(Event { id, at, taken, body }));
        drop(rings);
        self.publish(id);
    }

    /// Takes a message from a device.
    ///
    /// # Errors
    /// The buffer is full of messages younger than [`MESSAGE_KEPT_AT_LEAST`].
    pub fn message(
        &self,
        at: WallTime,
        now: Instant,
        device: DeviceId,
        external_id: Option<&Label>,
        received: Received,
    ) -> Result<(), BufferFull> {
        let (payload, payload_base64) = match received.payload {
            Payload::Json(json) => {
                let json = RawValue::from_string(json.into());
                debug_assert!(json.is_ok(), "the payload was valid JSON when its frame was read");
                (json.ok(), None)
            }
            Payload::Text(text) => (serde_json::value::to_raw_value(&text).ok(), None),
            Payload::Binary(bytes) => (None, Some(BASE64_STANDARD.encode(bytes).into_boxed_str())),
        };
        let body = Body::Message {
            device,
            external_id: external_id.cloned(),
            message: received.id,
            topic: received.topic,
            payload: payload.map(Arc::from),
            payload_base64,
        };
        let size = body.payload_len();
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        while rings.messages.len() >= MESSAGES_MAX || rings.message_bytes + size > MESSAGE_BYTES_MAX {
            match rings.messages.front() {
                Some(oldest) if now.saturating_since(oldest.taken) >= MESSAGE_KEPT_AT_LEAST => rings.drop_message(),
                Some(_) | None => return Err(BufferFull),
            }
        }
        rings.last_id += 1;
        let id = rings.last_id;
        rings.message_bytes += size;
        let taken = now;
        rings.messages.push_back(Arc::new(Event { id, at, taken, body }));
        drop(rings);
        self.publish(id);
        Ok(())
    }

    /// Wakes readers. Writers may come here in another order than their events have: the number never goes back.
    fn publish(&self, id: u64) {
        self.newest.send_if_modified(|newest| {
            let is_newer = id > *newest;
            if is_newer {
                *newest = id;
            }
            is_newer
        });
    }

    /// Up to `len_max` events after number `after`, oldest first, with payloads of at most `bytes_max` together: at
    /// least one event.
    #[must_use]
    pub fn after(&self, after: u64, len_max: usize, bytes_max: usize) -> Page {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let tail = |ring: &VecDeque<Arc<Event>>| -> Vec<Arc<Event>> {
            let start = ring.partition_point(|event| event.id <= after);
            let mut bytes = 0;
            ring.iter()
                .skip(start)
                .take(len_max)
                .take_while(|event| {
                    let fits = bytes == 0 || bytes + event.payload_len() <= bytes_max;
                    bytes += event.payload_len();
                    fits
                })
                .cloned()
                .collect()
        };
        let available = |ring: &VecDeque<Arc<Event>>| ring.len() - ring.partition_point(|event| event.id <= after);
        let present = available(&rings.notices) + available(&rings.messages);
        let missed = u64::try_from(present).unwrap_or(u64::MAX) < rings.last_id.saturating_sub(after);
        let mut events = tail(&rings.notices);
        let messages = tail(&rings.messages);
        // Notices behind the last message wait for the next page: a message that did not fit comes before them.
        if messages.len() < available(&rings.messages)
            && let Some(last) = messages.last()
        {
            events.retain(|event| event.id < last.id);
        }
        events.extend(messages);
        drop(rings);
        events.sort_unstable_by_key(|event| event.id);
        events.truncate(len_max);
        Page { events, missed }
    }

    /// The number of the newest event; changes wake a reader.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

impl Rings {
    fn drop_message(&mut self) {
        if let Some(event) = self.messages.pop_front() {
            self.message_bytes -= event.body.payload_len();
        }
    }
}

fn known_fields<S: serde::Serializer>(known: &Known, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry("state", PresenceState::of(known.presence).as_str())?;
    map.serialize_entry("since", &known.since.to_rfc3339())?;
    map.serialize_entry("epoch", &known.epoch.to_string())?;
    if let Some(cause) = cause_of(known.presence) {
        map.serialize_entry("cause", cause)?;
    }
    if let Some(evidence) = EvidenceText::of(known.presence) {
        map.serialize_entry("evidence", &evidence)?;
    }
    map.end()
}

fn tenant_and_cohort<S: serde::Serializer>(group: &Group, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(2))?;
    map.serialize_entry("tenant", &*group.tenant)?;
    map.serialize_entry("cohort", &group.cohort.name())?;
    map.end()
}

fn rfc3339<S: serde::Serializer>(at: &WallTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&at.to_rfc3339())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_gets_everything_after_its_last_event_in_order() {
        let events = Events::default();
        drain(&events, 1);
        message(&events, 2).unwrap();
        drain(&events, 3);

        let page = events.after(1, 10, BYTES);

        assert_eq!(page.events.iter().map(|event| event.id).collect::<Vec<_>>(), [2, 3]);
        assert!(!page.missed);
    }

    #[test]
    fn a_late_reader_is_told_that_it_missed_some() {
        let events = Events::default();
        for n in 0..=NOTICES_MAX {
            drain(&events, n as u64);
        }

        assert!(events.after(0, 10, BYTES).missed);
        assert!(!events.after(1, 10, BYTES).missed);
    }

    #[test]
    fn a_full_buffer_takes_no_message_until_the_oldest_had_its_time() {
        let events = Events::default();
        for _ in 0..MESSAGES_MAX {
            message(&events, 1_000).unwrap();
        }

        assert_eq!(message(&events, 10_999), Err(BufferFull));
        assert_eq!(message(&events, 11_000), Ok(()));
        drain(&events, 11_000);
    }

    #[test]
    fn the_sse_name_is_the_json_type() {
        let events = Events::default();
        drain(&events, 5);

        let json = serde_json::to_value(&*events.after(0, 1, BYTES).events[0]).unwrap();

        assert_eq!(json["type"], "drain");
        assert_eq!(json["at"], "1970-01-01T00:00:00.005Z");
    }

    #[test]
    fn a_wall_clock_that_is_set_back_stops_no_message() {
        let events = Events::default();
        let hour = 3_600_000;
        for _ in 0..MESSAGES_MAX {
            message_at(&events, WallTime::from_unix_ms(hour), 1_000).unwrap();
        }

        assert_eq!(message_at(&events, WallTime::from_unix_ms(0), 10_999), Err(BufferFull));
        assert_eq!(message_at(&events, WallTime::from_unix_ms(0), 11_000), Ok(()));
        // Nor does one that is set forward drop a message before its time.
        let mut full = Ok(());
        while full.is_ok() {
            full = message_at(&events, WallTime::from_unix_ms(1_000 * hour), 12_000);
        }
        assert_eq!(events.rings.lock().unwrap().messages.len(), MESSAGES_MAX);
    }

    #[test]
    fn a_page_is_bounded_in_bytes_and_leaves_no_event_out() {
        let events = Events::default();
        for n in 0..20 {
            message(&events, n).unwrap();
            drain(&events, n);
        }

        let mut seen = Vec::new();
        loop {
            let page = events.after(seen.last().copied().unwrap_or(0), 10, 5);
            let bytes: usize = page.events.iter().map(|event| event.payload_len()).sum();
            assert!(bytes <= 5 && !page.missed);
            if page.events.is_empty() {
                break;
            }
            seen.extend(page.events.iter().map(|event| event.id));
        }

        assert_eq!(seen, (1..=40).collect::<Vec<_>>());
    }

    #[test]
    fn one_message_over_the_bound_is_a_page_of_its_own() {
        let events = Events::default();
        message(&events, 1).unwrap();
        message(&events, 2).unwrap();

        assert_eq!(events.after(0, 10, 1).events.len(), 1);
    }

    #[test]
    fn the_number_of_the_newest_event_never_goes_back() {
        let events = Events::default();
        let mut newest = events.subscribe();

        events.publish(6);
        newest.mark_unchanged();
        events.publish(5);

        assert_eq!(*newest.borrow(), 6);
        assert!(!newest.has_changed().unwrap());
    }

    #[test]
    fn a_time_after_the_year_9999_is_its_last_millisecond() {
        assert_eq!(
            WallTime::from_unix_ms(u64::MAX).to_rfc3339(),
            "9999-12-31T23:59:59.999Z"
        );
    }

    /// More than all payloads of a test together.
    const BYTES: usize = 1 << 20;

    fn drain(events: &Events, at: u64) {
        let body = Body::Drain { state: "test" };
        events.notice(WallTime::from_unix_ms(at), body);
    }

    fn message(events: &Events, at: u64) -> Result<(), BufferFull> {
        message_at(events, WallTime::from_unix_ms(at), at)
    }

    fn message_at(events: &Events, wall: WallTime, now_ms: u64) -> Result<(), BufferFull> {
        let device = DeviceId::from_uuid(uuid::Uuid::from_u128(1));
        let received = Received {
            id: Some("m".into()),
            topic: None,
            payload: Payload::Json("{}".into()),
        };
        let now = Instant::ZERO + Duration::from_millis(now_ms);
        events.message(wall, now, device, None, received)
    }
}
