//! The reference device, without its socket: events and `now` in, waits and actions out.
//!
//! [`Device`] decides when to connect, what to do with each refusal, frame and close code, and how long to stay away
//! (docs/PROTOCOL.md, docs/design/slots.md). It opens no socket, reads no clock and owns no random source: the
//! driver runs it on real connections, the simulator ten million of it in virtual time.

mod closing;
mod limits;
#[cfg(test)]
mod tests;

use std::time::Duration;

use rand::Rng;
use seawall_proto::{frame::ServerFrame, id::RuleId, refusal::Hint, time::Instant};

pub use self::limits::*;
use crate::{
    backoff::{Attempts, BASE, Backoff, CAP_DEFAULT, CAP_MAX, Exponential, Fixed, FullJitter, Hinted, between},
    profile::{FLAPPING_SESSION, HALF_OPEN_SILENCE, IMMEDIATE, Profile},
};

/// One device's client machine.
///
/// The caller owes it three things: a `handle_*` call for each event, [`handle_timeout`](Self::handle_timeout) once the
/// time of [`poll_timeout`](Self::poll_timeout) has come, and after each of them [`poll_action`](Self::poll_action) until
/// it is empty. An event that does not fit the phase (the close of a session that is over) changes nothing.
#[derive(Debug)]
pub struct Device {
    profile: Profile,
    attempts: Attempts,
    connect_timeout_ms: u32,
    answer_timeout_ms: u32,
    backoff_cap_ms: u32,
    /// 0 until a welcome names it, and for ever in a plain session.
    heartbeat_ms: u32,
    phase: Phase,
    slot: Option<Box<str>>,
    resume: Option<Box<str>>,
    action: Option<Action>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Waiting { until: Instant },
    Connecting { deadline: Instant },
    Online(Online),
    Stopped { code: u16 },
}

/// A session, as times.
#[derive(Clone, Copy, Debug)]
struct Online {
    since: Instant,
    /// The gateway was last heard.
    heard_at: Instant,
    /// The device last said something, be it the pong that the socket layer sends for each ping.
    spoke_at: Instant,
    /// When the profile ends the session on its own.
    leave_at: Instant,
    /// When a `reconnect` frame asked the device to return.
    return_at: Option<Instant>,
}

/// How long an attempt may take. Each 1 ms to 49 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Until the connection is open, TCP and TLS together.
    pub connect: Duration,
    /// From then on, until the request is answered.
    pub answer: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: CONNECT_TIMEOUT_DEFAULT,
            answer: ANSWER_TIMEOUT_DEFAULT,
        }
    }
}

/// The notice of a restricted session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpdateNotice {
    pub rule: RuleId,
    /// The JSON object that describes the update.
    pub update: Box<str>,
}

/// What the caller must do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open a connection, and report `handle_opened`; show [`Device::slot`] and [`Device::resume`], and report `handle_connected` or
    /// `handle_refused`. At any time, `handle_failed`.
    Connect,
    /// Send `{"type":"heartbeat"}`.
    SendHeartbeat,
    /// Send `{"type":"ack","id":…}`.
    SendAck { id: Box<str> },
    /// A rule restricts the device: begin the update, if it proves to be authentic. The gateway closes the session with
    /// a hint; the machine keeps to it.
    Update(Box<UpdateNotice>),
    /// Reset the connection or give up the current attempt. The machine expects no report.
    Abort,
}

/// What a device is doing, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Until the time that `poll_timeout` tells.
    Waiting,
    Connecting,
    Online,
    /// A close code told it not to return on its own.
    Stopped {
        code: u16,
    },
}

/// A close frame, as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloseFrame<'a> {
    pub code: u16,
    pub reason: &'a str,
}

impl Device {
    /// A device that makes its first attempt at `first_attempt_at`; at [`Instant::FAR_FUTURE`], once it is restarted.
    #[must_use]
    pub fn new(profile: Profile, first_attempt_at: Instant) -> Self {
        Self {
            profile,
            attempts: Attempts::NONE,
            connect_timeout_ms: millis(CONNECT_TIMEOUT_DEFAULT),
            answer_timeout_ms: millis(ANSWER_TIMEOUT_DEFAULT),
            backoff_cap_ms: millis(CAP_DEFAULT),
            heartbeat_ms: 0,
            phase: Phase::Waiting {
                until: first_attempt_at,
            },
            slot: None,
            resume: None,
            action: None,
        }
    }

    /// Its attempts may take this long, instead of the default.
    #[must_use]
    pub fn with_patience(mut self, Patience { connect, answer }: Patience) -> Self {
        self.connect_timeout_ms = millis(connect).max(1);
        self.answer_timeout_ms = millis(answer).max(1);
        self
    }

    #[must_use]
    pub const fn profile(&self) -> Profile {
        self.profile
    }

    #[must_use]
    pub const fn state(&self) -> State {
        match self.phase {
            Phase::Waiting { .. } => State::Waiting,
            Phase::Connecting { .. } => State::Connecting,
            Phase::Online(_) => State::Online,
            Phase::Stopped { code } => State::Stopped { code },
        }
    }

    /// The slot token to show at the next attempt (header `Seawall-Slot`).
    #[must_use]
    pub fn slot(&self) -> Option<&str> {
        self.slot.as_deref()
    }

    /// The resume token to show at the next attempt (header `Seawall-Resume`). A profile that knows nothing of slots knows nothing of it.
    #[must_use]
    pub fn resume(&self) -> Option<&str> {
        self.resume.as_deref().filter(|_| self.profile.obeys_hints())
    }

    /// Attempts and unstable sessions since the last stable one.
    #[must_use]
    pub const fn attempts(&self) -> u8 {
        self.attempts.get()
    }

    /// When [`handle_timeout`](Self::handle_timeout) has something to do. `None`: nothing but an event can move the device.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Waiting { until } => (*until != Instant::FAR_FUTURE).then_some(*until),
            Phase::Connecting { deadline } => Some(*deadline),
            Phase::Online(online) => {
                let due = online
                    .leave_at
                    .min(self.silence_ends(online))
                    .min(self.heartbeat_due(online));
                (due != Instant::FAR_FUTURE).then_some(due)
            }
            Phase::Stopped { .. } => None,
        }
    }

    /// The action to carry out. At most one action waits at a time.
    pub const fn poll_action(&mut self) -> Option<Action> {
        self.action.take()
    }

    /// The time of [`poll_timeout`](Self::poll_timeout) has come. Does nothing where it has not.
    pub fn handle_timeout(&mut self, now: Instant, rng: &mut impl Rng) {
        match self.phase {
            Phase::Waiting { until } if until <= now => {
                self.phase = Phase::Connecting {
                    deadline: now + Duration::from_millis(self.connect_timeout_ms.into()),
                };
                self.act(Action::Connect);
            }
            Phase::Connecting { deadline } if deadline <= now => {
                self.act(Action::Abort);
                self.handle_failed(now, rng);
            }
            Phase::Online(online) => self.handle_online_timeout(online, now, rng),
            Phase::Waiting { .. } | Phase::Connecting { .. } | Phase::Stopped { .. } => {}
        }
    }

    /// The connection of the attempt is open, with TLS where there is any, and its request goes out.
    pub fn handle_opened(&mut self, now: Instant) {
        if let Phase::Connecting { deadline } = &mut self.phase {
            *deadline = now + Duration::from_millis(self.answer_timeout_ms.into());
        }
    }

    /// The gateway refused the attempt, with a hint or without one.
    pub fn handle_refused(&mut self, hint: Option<Hint>, now: Instant, rng: &mut impl Rng) {
        if !matches!(self.phase, Phase::Connecting { .. }) {
            return;
        }
        match hint.filter(|_| self.profile.obeys_hints()) {
            Some(hint) => {
                // A refusal without a slot takes none away: the one before keeps its seniority at other nodes.
                self.slot = hint.slot.or(self.slot.take());
                let mut policy = Hinted {
                    attempts: &mut self.attempts,
                    hint: hint.after,
                };
                let wait = policy.next_backoff();
                self.wait(wait, now);
            }
            None => self.handle_failed(now, rng),
        }
    }

    /// The attempt got no answer: refused by the network, reset, timed out, not HTTP.
    pub fn handle_failed(&mut self, now: Instant, rng: &mut impl Rng) {
        if !matches!(self.phase, Phase::Connecting { .. }) {
            return;
        }
        let (attempts, cap) = (&mut self.attempts, Duration::from_millis(self.backoff_cap_ms.into()));
        let wait = match self.profile {
            Profile::Fixed { seconds } => Fixed(Duration::from_secs(seconds.into())).next_backoff(),
            Profile::Immediate => Fixed(IMMEDIATE).next_backoff(),
            Profile::ExponentialNoJitter => Exponential { attempts, cap }.next_backoff(),
            Profile::WellBehaved
            | Profile::IgnoresHints
            | Profile::Patient
            | Profile::SlowReader
            | Profile::HalfOpen
            | Profile::Flapping
            | Profile::DuplicateId => FullJitter { attempts, cap, rng }.next_backoff(),
        };
        self.wait(wait, now);
    }

    /// The gateway answered 101.
    pub fn handle_connected(&mut self, now: Instant, rng: &mut impl Rng) {
        if !matches!(self.phase, Phase::Connecting { .. }) {
            return;
        }
        self.slot = None;
        self.heartbeat_ms = 0;
        let leave_at = match self.profile {
            Profile::HalfOpen => now + HALF_OPEN_SILENCE,
            Profile::Flapping => now + between(FLAPPING_SESSION.0, FLAPPING_SESSION.1, rng),
            Profile::WellBehaved
            | Profile::Fixed { .. }
            | Profile::Immediate
            | Profile::IgnoresHints
            | Profile::ExponentialNoJitter
            | Profile::Patient
            | Profile::SlowReader
            | Profile::DuplicateId => Instant::FAR_FUTURE,
        };
        self.phase = Phase::Online(Online {
            since: now,
            heard_at: now,
            spoke_at: now,
            leave_at,
            return_at: None,
        });
    }

    /// A text frame came. A frame that this version does not know only proves that the gateway lives.
    pub fn handle_text(&mut self, text: &str, now: Instant) {
        let Phase::Online(online) = &mut self.phase else {
            return;
        };
        online.heard_at = now;
        match ServerFrame::parse(text) {
            Some(ServerFrame::Welcome {
                heartbeat_ms,
                backoff_cap_ms,
                resume,
                ..
            }) => {
                self.heartbeat_ms = clamp_ms(heartbeat_ms, HEARTBEAT_MIN, HEARTBEAT_MAX);
                self.backoff_cap_ms = clamp_ms(backoff_cap_ms, BASE, CAP_MAX);
                if let Some(resume) = resume {
                    self.resume = Some(resume.into());
                }
            }
            Some(ServerFrame::Resume { token }) => self.resume = Some(token.into()),
            Some(ServerFrame::Message { id, .. }) => {
                online.spoke_at = now;
                self.act(Action::SendAck { id: id.into() });
            }
            Some(ServerFrame::Reconnect { after_ms, slot, .. }) if self.profile.obeys_hints() => {
                online.return_at = Some(now + Duration::from_millis(after_ms));
                self.slot = slot.map(Box::from);
            }
            Some(ServerFrame::Update { rule, update }) => self.act(Action::Update(Box::new(UpdateNotice {
                rule,
                update: update.get().into(),
            }))),
            Some(ServerFrame::Reconnect { .. } | ServerFrame::Ack { .. } | ServerFrame::Error { .. }) | None => {}
        }
    }

    /// A pong or a binary frame came.
    pub const fn handle_heard(&mut self, now: Instant) {
        if let Phase::Online(online) = &mut self.phase {
            online.heard_at = now;
        }
    }

    /// A ping came, and the socket layer answers it: both ends have spoken.
    pub const fn handle_ping(&mut self, now: Instant) {
        if let Phase::Online(online) = &mut self.phase {
            online.heard_at = now;
            online.spoke_at = now;
        }
    }

    /// The device itself restarts, as after an update: its connection and its memory are gone. Its next
    /// attempt is `after` from now (a fleet spreads it over [`FIRST_RETURN_MAX`](crate::backoff::FIRST_RETURN_MAX)). A stopped device stays stopped.
    pub fn handle_restart(&mut self, after: Duration, now: Instant) {
        match self.phase {
            Phase::Stopped { .. } => return,
            Phase::Connecting { .. } | Phase::Online(_) => self.act(Action::Abort),
            Phase::Waiting { .. } => {}
        }
        self.attempts.reset();
        (self.slot, self.resume) = (None, None);
        self.wait(Some(after), now);
    }

    fn handle_online_timeout(&mut self, online: Online, now: Instant, rng: &mut impl Rng) {
        if online.leave_at <= now || self.silence_ends(&online) <= now {
            self.act(Action::Abort);
            self.handle_closed(None, now, rng);
        } else if self.heartbeat_due(&online) <= now {
            self.phase = Phase::Online(Online {
                spoke_at: now,
                ..online
            });
            self.act(Action::SendHeartbeat);
        }
    }

    /// No policy here ever gives up (`None`); one that did would leave the device at its cap.
    fn wait(&mut self, wait: Option<Duration>, now: Instant) {
        let wait = wait.unwrap_or(Duration::from_millis(self.backoff_cap_ms.into()));
        self.phase = Phase::Waiting { until: now + wait };
    }

    fn heartbeat_due(&self, online: &Online) -> Instant {
        if self.heartbeat_ms == 0 || self.profile.is_silent() {
            return Instant::FAR_FUTURE;
        }
        let heartbeat = Duration::from_millis(self.heartbeat_ms.into());
        online.spoke_at + heartbeat + heartbeat / HEARTBEAT_SLACK_DIVISOR
    }

    fn silence_ends(&self, online: &Online) -> Instant {
        if !self.profile.gives_up_on_silence() {
            return Instant::FAR_FUTURE;
        }
        let heartbeat = match self.heartbeat_ms {
            0 => HEARTBEAT_DEFAULT,
            heartbeat_ms => Duration::from_millis(heartbeat_ms.into()),
        };
        online.heard_at + (heartbeat * HEARTBEATS_MISSED_MAX).max(SILENCE_MIN)
    }

    fn act(&mut self, action: Action) {
        debug_assert!(
            self.action.is_none(),
            "poll_action was not drained after the last event"
        );
        self.action = Some(action);
    }
}

fn clamp_ms(ms: u64, least: Duration, most: Duration) -> u32 {
    millis(Duration::from_millis(ms).clamp(least, most))
}

fn millis(span: Duration) -> u32 {
    u32::try_from(span.as_millis()).unwrap_or(u32::MAX)
}
