//! One live session: what to answer to each frame, when to ping, and when to give up (docs/PROTOCOL.md).
//!
//! Start with [`Session`]: `handle_*` what happened, then `poll_action` until it has nothing more to do, and come
//! back at `poll_timeout`. It holds no socket, no registry and no event buffer; what it wants done with them is an
//! [`Action`].

mod inbound;
mod limit;
mod silence;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use rand::Rng;
use serde_json::value::RawValue;

use crate::{
    close::Close,
    frame::{ErrorCode, ServerFrame},
    hello::SessionKind,
    id::SessionId,
    presence::observer::Observed,
    resume::Minted,
    time::{Instant, Tenths, WallTime},
};
use limit::{BadFrames, MessageRate};
use silence::Standing;
pub use silence::{Finding, KernelView, Silence};

/// A session is given up after this many heartbeats without a byte from the device.
const HEARTBEATS_MISSED_MAX: u32 = 3;

/// But never sooner than this: phones and modems sleep.
const SILENCE_MIN: Duration = Duration::from_secs(60);

/// One moment on the two clocks of a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// For pings. For what a device pays for: its message rate. And for what others decide by: its resume token.
    pub real: Instant,
    /// For silence.
    pub observed: Observed,
}

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
    /// Observed time without a byte from a device after which it is suspect, if it left pings unanswered.
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
    /// The device left two pings unanswered: it counts in the group test from now on.
    Silent,
    /// The device's deadline has passed, and its kernel buffer holds nothing of it.
    Suspect,
    /// The device was [silent](Self::Silent), and was heard.
    HeardAgain,
    /// Ask the kernel what it has of the device, and call [`Session::handle_kernel`] with the answer.
    AskKernel,
    /// Ask the group test for a verdict, and call [`Session::handle_verdict`] with it.
    AskGroups,
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
    standing: Standing,
    /// Pings since the device was last heard; stops at 255.
    pings_unanswered: u8,
    /// Messages to the device that it has not acknowledged: so many acknowledgements are free. Stops at 65,535.
    acks_expected: u16,
    last_heard: Observed,
    next_ping: Tenths,
    /// Earliest time of the next step towards its end. Only for a device that is silent.
    next_step: Observed,
    /// In seconds of monotonic time; [`NEVER`] where there is nothing to renew.
    renew_at_seconds: u32,
    limits: Arc<SessionLimits>,
    rate: MessageRate,
    /// Made at the first bad frame: most sessions have none.
    bad_frames: Option<Box<BadFrames>>,
    actions: VecDeque<Action>,
}

impl Session {
    /// A session that has just been upgraded. The welcome, where there is one, is its first action, and carries
    /// `resume`. A plain session has no frame for it.
    ///
    /// The first ping comes at a time drawn from the first heartbeat, so that sessions opened together don't ping
    /// together.
    pub fn open(
        kind: SessionKind,
        id: SessionId,
        resume: Option<&Minted>,
        limits: Arc<SessionLimits>,
        now: Moment,
        wall: WallTime,
        rng: &mut impl Rng,
    ) -> Self {
        let phase_micros = u64::try_from(limits.heartbeat.as_micros()).unwrap_or(u64::MAX).max(1);
        let next_ping = Tenths::not_before(now.real + Duration::from_micros(rng.random_range(1..=phase_micros)));
        let mut session = Self {
            kind,
            is_closing: false,
            standing: Standing::Heard,
            pings_unanswered: 0,
            acks_expected: 0,
            last_heard: now.observed,
            next_ping,
            next_step: Observed::ZERO,
            renew_at_seconds: NEVER,
            limits,
            rate: MessageRate::default(),
            bad_frames: None,
            actions: VecDeque::new(),
        };
        if kind == SessionKind::V1 {
            session.say(&ServerFrame::Welcome {
                session: id.to_string().into(),
                heartbeat_ms: millis(session.limits.heartbeat),
                backoff_cap_ms: millis(session.limits.backoff_cap),
                resume: resume.map(|minted| (&*minted.text).into()),
                server_time: wall.to_rfc3339().into(),
            });
            session.plan_renewal(resume, now.real);
        }
        session
    }

    /// A ping or a pong came in.
    pub fn handle_control(&mut self, now: Moment) {
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

    /// The time that [`poll_timeout`](Self::poll_timeout) named has come. Harmless at any other time. `health`: local
    /// health of the node, by which the deadline is stretched.
    pub fn handle_timeout(&mut self, now: Moment, health: u8) {
        if self.is_closing {
            return;
        }
        self.handle_silence(now, health);
        self.handle_ping_time(now);
        if seconds(now.real) >= self.renew_at_seconds {
            self.renew_at_seconds = NEVER;
            self.actions.push_back(Action::RenewToken);
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout). Frames only ever move it later, so that a timer need
    /// not be set anew for each of them: let it fire, ask again, and set it to what this says then. A resume token is
    /// renewed with the ping behind its time.
    ///
    /// Observed time never runs faster than monotonic time. So a step that is due by it may be named too early, and is
    /// named again then.
    #[must_use]
    pub fn poll_timeout(&self, now: Moment) -> Tenths {
        if self.is_closing {
            return Tenths::FAR_FUTURE;
        }
        let silent_until = self.silent_until();
        if silent_until == Observed::FAR_FUTURE {
            return self.next_ping;
        }
        let step_at = now.real + silent_until.saturating_since(now.observed);
        self.next_ping.min(Tenths::not_before(step_at))
    }

    /// How late a ping is that is due.
    #[must_use]
    pub fn ping_lag(&self, now: Instant) -> Option<Duration> {
        let due = self.next_ping.begin();
        (!self.is_closing && now >= due).then(|| now.saturating_since(due))
    }

    /// The next thing to do. Gives the queue's memory back when it was the last.
    pub fn poll_action(&mut self) -> Option<Action> {
        let action = self.actions.pop_front();
        if self.actions.is_empty() && self.actions.capacity() > 0 {
            self.actions = VecDeque::new();
        }
        action
    }

    /// The next thing to do about a device that is silent, past frames that can't be written: a broken path takes none.
    /// A close for silence ends the session there.
    pub fn poll_silence(&mut self) -> Option<Action> {
        let is_it = |action: &Action| match action {
            Action::Silent | Action::Suspect | Action::HeardAgain | Action::AskKernel | Action::AskGroups => true,
            Action::Close(close) => matches!(close, Close::HeartbeatMissed { .. }),
            Action::Text(_)
            | Action::Binary(_)
            | Action::Ping
            | Action::Received(_)
            | Action::Complained(_)
            | Action::Acked(_)
            | Action::RenewToken => false,
        };
        let at = self.actions.iter().position(is_it)?;
        self.actions.remove(at)
    }

    /// The close that was decided and is not carried out yet.
    #[must_use]
    pub fn pending_close(&self) -> Option<&Close> {
        self.actions.iter().find_map(|action| match action {
            Action::Close(close) => Some(close),
            Action::Text(_)
            | Action::Binary(_)
            | Action::Ping
            | Action::Received(_)
            | Action::Complained(_)
            | Action::Acked(_)
            | Action::RenewToken
            | Action::Silent
            | Action::Suspect
            | Action::HeardAgain
            | Action::AskKernel
            | Action::AskGroups => None,
        })
    }

    /// The next thing to do where that is to send text; `None` otherwise. What a session says first fits behind the
    /// bytes of its 101.
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
        self.renew_at_seconds = minted
            .and_then(|minted| minted.renew_after)
            .map_or(NEVER, |after| seconds(now + after).saturating_add(1));
    }

    fn say(&mut self, frame: &ServerFrame<'_>) {
        self.actions.push_back(Action::Text(frame.to_json()));
    }
}

/// Seconds of monotonic time that are never reached.
const NEVER: u32 = u32::MAX;

fn seconds(at: Instant) -> u32 {
    u32::try_from(at.as_micros() / 1_000_000).unwrap_or(NEVER - 1)
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
