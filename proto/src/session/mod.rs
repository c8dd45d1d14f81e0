//! One live session: what to answer to each frame, when to ping, and when to give up (contract sections 4 and 5).
//!
//! Start with [`Session`]: `handle_*` what happened, then `poll_action` until it has nothing more to do, and come back at
//! `poll_timeout`. It holds no socket, no registry and no event buffer; what it wants done with them is an [`Action`].

mod inbound;
mod limit;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use rand::Rng;
use serde_json::value::RawValue;

use crate::{
    close::Close,
    frame::{ErrorCode, ServerFrame},
    hello::SessionKind,
    id::SessionId,
    resume::Minted,
    time::{Instant, WallTime},
};
use limit::{BadFrames, MessageRate};

/// A session is given up after this many heartbeats without a frame from the device.
const HEARTBEATS_MISSED_MAX: u32 = 3;

/// Pings that a device must have left unanswered before its session is given up, the last of them for a heartbeat. The clock alone does
/// not prove silence: a process that was stopped for minutes, or a machine that slept, sent no pings meanwhile.
const PINGS_UNANSWERED_MIN: u8 = 2;

/// But never sooner than this: phones and modems sleep.
const SILENCE_MIN: Duration = Duration::from_secs(60);

/// What all sessions of a node have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Between two pings. Default 30 s.
    pub heartbeat: Duration,
    /// Told to devices in the welcome. Default 60 s.
    pub backoff_cap: Duration,
    /// Frames a second, of any kind, that a device may send for long. Default 100.
    pub messages_per_second: u32,
    /// Frames that a device may send at once. Default 500.
    pub messages_burst: u32,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(30),
            backoff_cap: Duration::from_secs(60),
            messages_per_second: 100,
            messages_burst: 500,
        }
    }
}

impl SessionLimits {
    /// Time without a frame from a device after which its session is given up, if it left pings unanswered.
    #[must_use]
    pub fn silence_max(&self) -> Duration {
        self.heartbeat.saturating_mul(HEARTBEATS_MISSED_MAX).max(SILENCE_MIN)
    }
}

/// What the caller owes the session, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send one text frame.
    Text(String),
    /// Send one binary frame.
    Binary(Vec<u8>),
    /// Send a ping.
    Ping,
    /// Put a device's message into the event buffer, and call [`Session::handle_stored`] if it was taken.
    Received(Received),
    /// Count it: the device sent what it should not.
    Complained(ErrorCode),
    /// The device has the gateway's message of this id: tell whoever waits for it.
    Acked(Box<str>),
    /// The device's resume token is due for renewal: make another and call [`Session::handle_token`] with it.
    RenewToken,
    /// Send a close frame with this code and reason, and end the session. Nothing follows.
    Close(Close),
}

/// A message from a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// What the device wants acknowledged; `None` in a plain session.
    pub id: Option<Box<str>>,
    pub topic: Option<Box<str>>,
    pub payload: Payload,
}

/// What a device's message carries. Copied out of the socket's buffer, which it would otherwise keep alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Valid JSON, as the device wrote it.
    Json(Box<str>),
    /// A text frame of a plain session.
    Text(Box<str>),
    /// A binary frame of a plain session.
    Binary(Box<[u8]>),
}

/// A message to a device.
#[derive(Clone, Copy, Debug)]
pub enum OutBody<'a> {
    /// JSON: the payload of a `message` frame, or the text frame of a plain session as it is.
    Json(&'a str),
    /// A binary frame; for plain sessions only.
    Binary(&'a [u8]),
}

/// The message can't be said in this kind of session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsendable {
    #[error("a seawall.v1 session carries no binary frames")]
    BinaryInV1,
    #[error("the payload is not JSON")]
    NotJson,
    #[error("the session is ending")]
    Closing,
}

/// The state of one session.
#[derive(Debug)]
pub struct Session {
    kind: SessionKind,
    is_closing: bool,
    /// Pings since the last frame from the device; stops at [`PINGS_UNANSWERED_MIN`].
    pings_unanswered: u8,
    /// Messages to the device that it has not acknowledged: so many acknowledgements are free. Stops at 65,535.
    acks_expected: u16,
    limits: Arc<SessionLimits>,
    last_heard: Instant,
    next_ping: Instant,
    /// When the last ping that [`pings_unanswered`](Self::pings_unanswered) counts was sent.
    unanswered_since: Instant,
    /// [`Instant::FAR_FUTURE`] where there is nothing to renew.
    renew_at: Instant,
    rate: MessageRate,
    /// Made at the first bad frame: most sessions have none.
    bad_frames: Option<Box<BadFrames>>,
    actions: VecDeque<Action>,
}

impl Session {
    /// A session that has just been upgraded. The welcome, where there is one, is its first action, and carries `resume`. A plain
    /// session has no frame for it.
    ///
    /// The first ping comes at a time drawn from the first heartbeat, so that sessions opened together don't ping together.
    pub fn open(
        kind: SessionKind,
        id: SessionId,
        resume: Option<&Minted>,
        limits: Arc<SessionLimits>,
        now: Instant,
        wall: WallTime,
        rng: &mut impl Rng,
    ) -> Self {
        let phase_micros = u64::try_from(limits.heartbeat.as_micros()).unwrap_or(u64::MAX).max(1);
        let next_ping = now + Duration::from_micros(rng.random_range(1..=phase_micros));
        let mut session = Self {
            kind,
            is_closing: false,
            pings_unanswered: 0,
            acks_expected: 0,
            limits,
            last_heard: now,
            next_ping,
            unanswered_since: now,
            renew_at: Instant::FAR_FUTURE,
            rate: MessageRate::new(now),
            bad_frames: None,
            actions: VecDeque::new(),
        };
        if kind == SessionKind::V1 {
            session.say(&ServerFrame::Welcome {
                session: id.to_string().into(),
                heartbeat_ms: millis(session.limits.heartbeat),
                backoff_cap_ms: millis(session.limits.backoff_cap),
                resume: resume.map(|minted| (&*minted.text).into()),
                server_time: rfc3339(wall).into(),
            });
            session.plan_renewal(resume, now);
        }
        session
    }

    /// A ping or a pong came in.
    pub fn handle_control(&mut self, now: Instant) {
        self.heard(now);
    }

    /// Another resume token for the device, asked for by [`Action::RenewToken`] or made before a close that
    /// [wants one](Self::wants_token_before). Says nothing in a plain session.
    pub fn handle_token(&mut self, minted: &Minted, now: Instant) {
        match self.kind {
            SessionKind::V1 if !self.is_closing => {
                self.say(&ServerFrame::Resume {
                    token: (&*minted.text).into(),
                });
                self.plan_renewal(Some(minted), now);
            }
            SessionKind::V1 | SessionKind::Plain => {}
        }
    }

    /// Whether the device should get a fresh token before its session ends like this: it was asked to come back.
    #[must_use]
    pub const fn wants_token_before(&self, close: &Close) -> bool {
        matches!(self.kind, SessionKind::V1) && !self.is_closing && matches!(close, Close::Restart { .. })
    }

    /// The message of this id is in the event buffer.
    pub fn handle_stored(&mut self, id: &str) {
        if !self.is_closing {
            self.say(&ServerFrame::Ack { id: id.into() });
        }
    }

    /// Somebody wants a message delivered.
    ///
    /// # Errors
    /// It can't be said in this kind of session, or the session is ending.
    pub fn handle_message_out(&mut self, id: &str, body: OutBody<'_>) -> Result<(), Unsendable> {
        if self.is_closing {
            return Err(Unsendable::Closing);
        }
        match (self.kind, body) {
            (SessionKind::V1, OutBody::Json(json)) => {
                let payload: &RawValue = serde_json::from_str(json).map_err(|_| Unsendable::NotJson)?;
                self.say(&ServerFrame::Message { id: id.into(), payload });
                self.acks_expected = self.acks_expected.saturating_add(1);
            }
            (SessionKind::V1, OutBody::Binary(_)) => return Err(Unsendable::BinaryInV1),
            (SessionKind::Plain, OutBody::Json(text)) => self.actions.push_back(Action::Text(text.to_owned())),
            (SessionKind::Plain, OutBody::Binary(bytes)) => self.actions.push_back(Action::Binary(bytes.to_vec())),
        }
        Ok(())
    }

    /// The session shall end. The first reason counts.
    pub fn handle_close(&mut self, close: Close) {
        if self.is_closing {
            return;
        }
        if let (SessionKind::V1, Close::Restart { why, hint }) = (self.kind, &close) {
            self.say(&ServerFrame::Reconnect {
                after_ms: hint.after_ms(),
                slot: hint.slot.as_deref().map(Into::into),
                reason: why.as_str().into(),
            });
        }
        self.is_closing = true;
        self.actions.push_back(Action::Close(close));
    }

    /// The time that [`poll_timeout`](Self::poll_timeout) named has come. Harmless at any other time.
    pub fn handle_timeout(&mut self, now: Instant, rng: &mut impl Rng) {
        if self.is_closing {
            return;
        }
        if now >= self.next_ping + self.limits.heartbeat {
            // A whole ping was missed: this process stood still. What the device sent meanwhile may not be read yet.
            self.pings_unanswered = 0;
        }
        if now >= self.silent_until() {
            return self.handle_close(Close::heartbeat_missed(rng));
        }
        if now >= self.next_ping {
            self.actions.push_back(Action::Ping);
            if self.pings_unanswered < PINGS_UNANSWERED_MIN {
                self.pings_unanswered += 1;
                self.unanswered_since = now;
            }
            self.next_ping += self.limits.heartbeat;
            if self.next_ping <= now {
                self.next_ping = now + self.limits.heartbeat;
            }
        }
        if now >= self.renew_at {
            self.renew_at = Instant::FAR_FUTURE;
            self.actions.push_back(Action::RenewToken);
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout). Frames only ever move it later, so that a timer need not be
    /// set anew for each of them: let it fire, ask again, and set it to what this says then. A new resume token moves it, too; its
    /// renewal may wait for the ping before.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        if self.is_closing {
            return Instant::FAR_FUTURE;
        }
        self.next_ping.min(self.renew_at).min(self.silent_until())
    }

    /// The next thing to do. Gives the queue's memory back when it was the last.
    pub fn poll_action(&mut self) -> Option<Action> {
        let action = self.actions.pop_front();
        if self.actions.is_empty() && self.actions.capacity() > 0 {
            self.actions = VecDeque::new();
        }
        action
    }

    /// The next thing to do where that is to send text; `None` otherwise. What a session says first fits behind the bytes of its
    /// 101.
    pub fn poll_text(&mut self) -> Option<String> {
        if !matches!(self.actions.front(), Some(Action::Text(_))) {
            return None;
        }
        match self.poll_action() {
            Some(Action::Text(text)) => Some(text),
            Some(_) | None => None,
        }
    }

    /// True where [`poll_action`](Self::poll_action) has something to do.
    #[must_use]
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// True once a close was decided: what the device still sends does not count.
    #[must_use]
    pub const fn is_closing(&self) -> bool {
        self.is_closing
    }

    fn plan_renewal(&mut self, minted: Option<&Minted>, now: Instant) {
        self.renew_at = minted
            .and_then(|minted| minted.renew_after)
            .map_or(Instant::FAR_FUTURE, |after| now + after);
    }

    /// When the session is given up, if nothing is heard until then.
    fn silent_until(&self) -> Instant {
        if self.pings_unanswered < PINGS_UNANSWERED_MIN {
            return Instant::FAR_FUTURE;
        }
        let answerable_until = self.unanswered_since + self.limits.heartbeat;
        answerable_until.max(self.last_heard + self.limits.silence_max())
    }

    fn say(&mut self, frame: &ServerFrame<'_>) {
        self.actions.push_back(Action::Text(frame.to_json()));
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The last millisecond that RFC 3339 can write: the year has four digits.
const RFC3339_MAX: Duration = Duration::from_millis(253_402_300_799_999);

fn rfc3339(wall: WallTime) -> String {
    let since_epoch = Duration::from_millis(wall.as_unix_ms()).min(RFC3339_MAX);
    humantime::format_rfc3339_millis(std::time::SystemTime::UNIX_EPOCH + since_epoch).to_string()
}

#[cfg(test)]
mod tests;
