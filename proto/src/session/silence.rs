//! A device that is not heard: pings, its deadline, and what is asked before it is given up.
//!
//! The steps are in docs/design/presence.md, "From silence to offline". A byte from the device ends them at any point.

use std::time::Duration;

use rand::Rng;

use crate::{
    close::Close,
    presence::{
        groups::Verdict,
        observer::{Observed, RECOVERY},
    },
    session::{Action, Moment, Session},
    time::Tenths,
};

/// Pings that a device must have left unanswered before its deadline counts, the last of them for a heartbeat.
const PINGS_UNANSWERED_MIN: u8 = 2;

/// Longest wait for the answer of a suspect.
const SUSPECT_MAX: Duration = Duration::from_secs(15);
/// The same for a path without delay.
const SUSPECT_MIN: Duration = Duration::from_secs(5);

/// Time until a suspect asks for its verdict again.
const VERDICT_INTERVAL: Duration = Duration::from_secs(1);

/// Time until a suspect whose group is held asks again by itself. It is called when the grace is over.
const HELD_INTERVAL: Duration = Duration::from_secs(60);

/// Data that came in so much later than the last that was handled is new. Below that both may be the same.
const NEW_DATA_MIN: Duration = Duration::from_secs(1);

/// How far a silent device is from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Heard,
    /// It left two pings unanswered.
    Silent,
    /// Its deadline has passed.
    Suspect,
    /// It left the suspect's ping unanswered: the group test decides.
    Waiting,
}

/// What the kernel knows of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelView {
    /// It holds bytes of the device that nobody has read.
    pub has_unread: bool,
    /// Time since the last data came in. `None` where the kernel does not tell.
    pub last_data: Option<Duration>,
    /// Smoothed round-trip time. `None` where the kernel does not tell.
    pub round_trip: Option<Duration>,
}

crate::labels! {
    /// Meaning of the kernel's answer about a silent device.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Finding {
        /// It was heard, and nobody has read it yet.
        Unread = "unread",
        /// A part of a message came in.
        Recent = "recent",
        Silent = "silent",
    }
}

/// What a session knows of its device's silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Pings since the device was last heard. Stops at 255.
    pub pings_unanswered: u8,
    /// Observed time since then.
    pub lasts: Duration,
}

impl Session {
    /// How long nothing was heard from the device.
    #[must_use]
    pub const fn silence(&self, now: Observed) -> Silence {
        Silence {
            pings_unanswered: self.pings_unanswered,
            lasts: now.saturating_since(self.last_heard),
        }
    }

    /// Nothing can be written to the device, and its kernel acknowledges nothing: it is silent, as if it had left pings
    /// unanswered.
    pub fn handle_stalled(&mut self, now: Observed) {
        if !self.is_closing && self.standing == Standing::Heard {
            self.become_silent(now);
            self.next_step = now;
        }
    }

    /// The kernel's answer to [`Action::AskKernel`].
    pub fn handle_kernel(&mut self, view: KernelView, now: Observed) -> Finding {
        if self.is_closing {
            return Finding::Silent;
        }
        let is_new = |last: &Duration| *last + NEW_DATA_MIN < self.limits.silence_max();
        if view.has_unread {
            self.note_heard(now);
            return Finding::Unread;
        }
        if let Some(last) = view.last_data.filter(is_new) {
            // A part of a message: nothing of it shows until the rest has come.
            self.note_heard(now);
            self.last_heard = now.before(last);
            return Finding::Recent;
        }
        match self.standing {
            Standing::Heard => {}
            Standing::Silent => {
                self.standing = Standing::Suspect;
                let round_trips = view.round_trip.unwrap_or(SUSPECT_MAX) * 2;
                self.next_step = now + (round_trips + SUSPECT_MIN).min(SUSPECT_MAX);
                self.actions.push_back(Action::Suspect);
                self.ping(now);
            }
            Standing::Suspect | Standing::Waiting => {
                self.standing = Standing::Waiting;
                self.actions.push_back(Action::AskGroups);
            }
        }
        Finding::Silent
    }

    /// The group test's answer to [`Action::AskGroups`].
    pub fn handle_verdict(&mut self, verdict: Verdict, now: Observed, rng: &mut impl Rng) {
        if self.standing != Standing::Waiting {
            return;
        }
        match verdict {
            Verdict::Wait => self.next_step = now + VERDICT_INTERVAL,
            Verdict::Held => self.next_step = now + HELD_INTERVAL,
            Verdict::AskAgain => {
                self.standing = Standing::Silent;
                self.next_step = now;
            }
            Verdict::Offline => self.handle_close(Close::heartbeat_missed(rng)),
        }
    }

    /// A byte came in: the device lives, and has answered what it was sent.
    pub(super) fn note_heard(&mut self, now: Observed) {
        self.last_heard = now;
        self.pings_unanswered = 0;
        if self.standing != Standing::Heard {
            self.standing = Standing::Heard;
            self.actions.push_back(Action::HeardAgain);
        }
    }

    /// Takes the next step towards the end of a device that is silent, if it is due.
    pub(super) fn handle_silence(&mut self, moment: Moment, health: u8) {
        let now = moment.observed;
        if moment.real >= self.next_ping.begin() + self.limits.heartbeat {
            // A whole ping was missed: this session stood still. What the device sent meanwhile may not be read yet.
            match self.standing {
                Standing::Heard => self.pings_unanswered = 0,
                Standing::Silent | Standing::Suspect | Standing::Waiting => {
                    self.next_step = now + self.limits.heartbeat;
                }
            }
        }
        // A session that waits for a verdict asks at each call: its group may have been released.
        if now < self.silent_until() && self.standing != Standing::Waiting {
            return;
        }
        let silence_max = self.limits.silence_max();
        let stretched = self.last_heard + silence_max * (1 + u32::from(health));
        if self.standing == Standing::Silent && now < stretched {
            // By then a node that has recovered is well.
            self.next_step = (now + RECOVERY * u32::from(health)).min(stretched);
            return;
        }
        self.next_step = now + VERDICT_INTERVAL;
        self.actions.push_back(Action::AskKernel);
    }

    /// Sends a ping, if it is time. By the monotonic clock: devices wait for pings whatever this node observes.
    ///
    /// A ping that is late by over half a heartbeat is left out. The next one is nearer, and after a stop of the process
    /// not all devices are pinged at once.
    pub(super) fn handle_ping_time(&mut self, now: Moment) {
        let Some(late) = self.ping_lag(now.real) else { return };
        let heartbeat = self.limits.heartbeat;
        if late <= heartbeat / 2 {
            self.ping(now.observed);
        }
        let missed = u32::try_from(late.as_micros() / heartbeat.as_micros().max(1)).unwrap_or(u32::MAX);
        let next = self.next_ping.begin() + heartbeat.saturating_mul(missed.saturating_add(1));
        self.next_ping = Tenths::not_before(next);
    }

    /// Sends a ping.
    pub(super) fn ping(&mut self, now: Observed) {
        if self.actions.contains(&Action::Ping) {
            // The device does not read: the one before has not gone out.
            return;
        }
        self.actions.push_back(Action::Ping);
        self.pings_unanswered = self.pings_unanswered.saturating_add(1);
        if self.standing == Standing::Heard && self.pings_unanswered >= PINGS_UNANSWERED_MIN {
            self.become_silent(now);
        }
    }

    fn become_silent(&mut self, now: Observed) {
        self.standing = Standing::Silent;
        self.next_step = now + self.limits.heartbeat;
        self.actions.push_back(Action::Silent);
    }

    /// When the next step towards its end is due, if nothing is heard until then.
    pub(super) fn silent_until(&self) -> Observed {
        match self.standing {
            Standing::Heard => Observed::FAR_FUTURE,
            Standing::Silent => self.next_step.max(self.last_heard + self.limits.silence_max()),
            Standing::Suspect | Standing::Waiting => self.next_step,
        }
    }
}

#[cfg(test)]
mod tests;
