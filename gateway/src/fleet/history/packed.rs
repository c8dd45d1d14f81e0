//! The record of one device, in 64 bytes. A million of them fit beside the sessions.

use std::{sync::Arc, time::Duration};

use seawall_proto::{
    cohorts::Past,
    id::{DeviceId, SessionId},
    presence::{Cause, Evidence, Known, Presence},
    time::{Instant, WallTime},
};

use super::{ATTEMPTS_MAX, Attempt, Change, Offline, Record, groups::Group};
use crate::{
    fleet::cohorts::Outcome,
    store::{PresenceState, Reason},
};

/// Bit of [`Kept::state`]: the database has an older state, and it is not queued.
const UNSAVED: u8 = 0x80;
/// First of the states whose cause is not known.
const UNKNOWN: u8 = 8;
/// Bits of [`Kept::ended`] for the device's past; the others are seconds since the start, plus one.
const PAST_BITS: u32 = 6;
const _: () = assert!(Past::BITS_MAX as u32 == (1 << PAST_BITS) - 1);
/// Bits of the detail of a silence for its length in milliseconds; the others are its pings.
const SILENCE_BITS: u32 = 26;
const SILENCE_MS_MAX: u32 = (1 << SILENCE_BITS) - 1;
const OUTCOME_BITS: u32 = 8;

/// A device.
#[derive(Debug)]
pub(super) struct Kept {
    pub device: DeviceId,
    epoch: SessionId,
    /// Milliseconds of the Unix epoch.
    since: [u8; 6],
    /// Presence, and [`UNSAVED`].
    state: u8,
    reason: Reason,
    /// When its last session ended, and the device's past with it. 0: it did not end here. While it is not offline: see
    /// [`session`](Self::session).
    ended: u32,
    /// Of the evidence: the close code, the silence, or the time that was waited. While it is not offline: see
    /// [`session`](Self::session).
    detail: u32,
    /// `None` before its first session.
    pub group: Option<Arc<Group>>,
    latest: Option<PackedAttempt>,
    earlier: Option<Box<Earlier>>,
}

/// Attempts before the latest, oldest first.
#[derive(Debug)]
struct Earlier(Box<[PackedAttempt]>);

/// Outcome below, milliseconds since the Unix epoch above: never 0, since an outcome is counted from 1.
#[derive(Debug, Clone, Copy)]
pub(super) struct PackedAttempt(std::num::NonZeroU64);

impl Kept {
    pub const fn new(device: DeviceId) -> Self {
        let never = Known::NEVER_SEEN;
        Self {
            device,
            epoch: never.epoch,
            since: [0; 6],
            state: UNKNOWN + Cause::NeverSeen as u8,
            reason: Reason::OTHER,
            ended: 0,
            detail: 0,
            group: None,
            latest: None,
            earlier: None,
        }
    }

    /// Presence of the device, as it is known.
    pub fn known(&self) -> Known {
        let [a, b, c, d, e, f] = self.since;
        let since = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        let before = |ms: u32| WallTime::from_unix_ms(since.saturating_sub(ms.into()));
        let presence = match self.state & !UNSAVED {
            0 => Presence::Online,
            by @ (1 | 2) => Presence::Offline(Evidence::Closed {
                code: u16::try_from(self.detail).unwrap_or(u16::MAX),
                by_device: by == 1,
            }),
            3 => Presence::Offline(Evidence::Reset),
            4 => Presence::Offline(Evidence::Silent {
                pings_unanswered: u8::try_from(self.detail >> SILENCE_BITS).unwrap_or(u8::MAX),
                last_heard: before(self.detail & SILENCE_MS_MAX),
            }),
            5 => Presence::Offline(Evidence::NotBack {
                since: before(self.detail),
            }),
            cause => {
                let cause = Cause::ALL.get(usize::from(cause.wrapping_sub(UNKNOWN)));
                Presence::Unknown(cause.copied().unwrap_or(Cause::NeverSeen))
            }
        };
        Known {
            epoch: self.epoch,
            presence,
            since: WallTime::from_unix_ms(since),
        }
    }

    /// Whether it is online, offline or unknown.
    pub const fn state(&self) -> PresenceState {
        match self.state & !UNSAVED {
            0 => PresenceState::Online,
            state if state < UNKNOWN => PresenceState::Offline,
            _ => PresenceState::Unknown,
        }
    }

    /// The session that the state is about. Its epoch is the session's id; it is greater if this node
    /// [claimed](Self::set_claim) the device.
    pub const fn session(&self) -> SessionId {
        let SessionId(epoch) = self.epoch;
        match self.state() {
            PresenceState::Offline => self.epoch,
            PresenceState::Online | PresenceState::Unknown => {
                SessionId(epoch - ((self.ended as u64) << 32 | self.detail as u64))
            }
        }
    }

    /// The state is about `session`, although its epoch is greater. For a device that is not offline.
    pub fn set_claim(&mut self, session: SessionId) {
        debug_assert_ne!(self.state(), PresenceState::Offline);
        let ahead = self.epoch.0.saturating_sub(session.0);
        self.ended = u32::try_from(ahead >> 32).unwrap_or(u32::MAX);
        self.detail = u32::try_from(ahead & 0xffff_ffff).unwrap_or(u32::MAX);
    }

    /// Replaces what is known of it. The length of a silence is kept up to 18 hours, its pings up to 63.
    pub fn set(&mut self, known: Known, reason: Reason) {
        let after = |earlier: WallTime, max: u32| {
            let span = known.since.saturating_since(earlier).as_millis();
            u32::try_from(span).unwrap_or(max).min(max)
        };
        let (state, detail) = match known.presence {
            Presence::Online => (0, 0),
            Presence::Offline(Evidence::Closed { code, by_device }) => (if by_device { 1 } else { 2 }, code.into()),
            Presence::Offline(Evidence::Reset) => (3, 0),
            Presence::Offline(Evidence::Silent {
                pings_unanswered,
                last_heard,
            }) => {
                let pings = u32::from(pings_unanswered).min(u32::MAX >> SILENCE_BITS);
                (4, pings << SILENCE_BITS | after(last_heard, SILENCE_MS_MAX))
            }
            Presence::Offline(Evidence::NotBack { since }) => (5, after(since, u32::MAX)),
            Presence::Unknown(cause) => (UNKNOWN + cause as u8, 0),
        };
        let [_, _, since @ ..] = known.since.as_unix_ms().to_be_bytes();
        self.epoch = known.epoch;
        self.since = since;
        self.state = state;
        self.reason = reason;
        self.detail = detail;
        self.ended = 0;
    }

    pub const fn reason(&self) -> Reason {
        self.reason
    }

    pub const fn is_unsaved(&self) -> bool {
        self.state & UNSAVED != 0
    }

    pub const fn set_unsaved(&mut self) {
        self.state |= UNSAVED;
    }

    pub const fn set_saved(&mut self) {
        self.state &= !UNSAVED;
    }

    /// Its last session ended here.
    pub fn set_ended(&mut self, at: Instant, past: Past) {
        let seconds = u32::try_from(at.as_micros() / 1_000_000).unwrap_or(u32::MAX);
        let seconds = (seconds.saturating_add(1)).min(u32::MAX >> PAST_BITS);
        self.ended = seconds << PAST_BITS | u32::from(past.bits());
    }

    /// When its last session ended here, in whole seconds, and the device's past with it. For a device that is offline.
    pub fn ended(&self) -> Option<(Instant, Past)> {
        let seconds = (self.ended >> PAST_BITS).checked_sub(1)?;
        let at = Instant::ZERO + Duration::from_secs(seconds.into());
        let [bits, ..] = self.ended.to_le_bytes();
        Some((at, Past::of_bits(bits)))
    }

    pub fn push(&mut self, attempt: Attempt) {
        if let Some(before) = self.latest.replace(attempt.into()) {
            let earlier = self.earlier.as_ref().map_or(&[][..], |earlier| &earlier.0);
            let surplus = (earlier.len() + 2).saturating_sub(ATTEMPTS_MAX);
            let kept = earlier[surplus..].iter().copied().chain([before]).collect();
            self.earlier = Some(Box::new(Earlier(kept)));
        }
    }

    /// Attempts, oldest first.
    fn attempts(&self) -> Vec<Attempt> {
        let earlier = self.earlier.as_ref().map_or(&[][..], |earlier| &earlier.0);
        earlier.iter().copied().chain(self.latest).map(Attempt::from).collect()
    }

    /// The last change. `None` before the first session.
    pub fn change(&self) -> Option<Change> {
        Some(Change {
            known: self.known(),
            reason: self.reason,
            group: Arc::clone(self.group.as_ref()?),
        })
    }

    pub fn record(&self) -> Record {
        let known = self.known();
        let offline = match known.presence {
            Presence::Offline(evidence) => {
                let ended = self.ended().zip(self.reason.end());
                ended.map(|((at, past), reason)| Offline {
                    since: known.since,
                    at,
                    reason,
                    evidence,
                    past,
                })
            }
            Presence::Online | Presence::Unknown(_) => None,
        };
        Record {
            attempts: self.attempts(),
            known,
            reason: self.reason,
            offline,
            group: self.group.clone(),
        }
    }
}

impl From<Attempt> for PackedAttempt {
    fn from(attempt: Attempt) -> Self {
        let index = u64::try_from(attempt.outcome.index()).unwrap_or(u64::MAX);
        let packed = attempt.at.as_unix_ms() << OUTCOME_BITS | (index + 1) & 0xff;
        Self(std::num::NonZeroU64::new(packed).unwrap_or(std::num::NonZeroU64::MIN))
    }
}

impl From<PackedAttempt> for Attempt {
    fn from(PackedAttempt(packed): PackedAttempt) -> Self {
        let [outcome, ..] = packed.get().to_le_bytes();
        Self {
            at: WallTime::from_unix_ms(packed.get() >> OUTCOME_BITS),
            outcome: Outcome::of_index(usize::from(outcome.saturating_sub(1))),
        }
    }
}

#[cfg(test)]
mod tests {
    use seawall_proto::refusal::Code;

    use super::*;

    #[test]
    fn device_takes_64_bytes() {
        assert_eq!(size_of::<Kept>(), 64);
    }

    #[test]
    fn attempts_are_packed_and_come_out_as_they_were() {
        let refused = Code::ALL.iter().map(|code| Outcome::Refused(*code));
        let others = [Outcome::Admitted, Outcome::Abandoned, Outcome::Restricted];
        for outcome in others.into_iter().chain(refused) {
            let at = WallTime::from_unix_ms(1_790_000_000_123);
            let attempt = Attempt { at, outcome };

            assert_eq!(Attempt::from(PackedAttempt::from(attempt)), attempt);
        }
    }

    #[test]
    fn each_state_is_packed_and_comes_out_as_it_was() {
        let at = WallTime::from_unix_ms(1_796_000_000_123);
        let earlier = WallTime::from_unix_ms(1_796_000_000_123 - 91_234);
        let offline = [
            Evidence::Closed {
                code: 1000,
                by_device: true,
            },
            Evidence::Closed {
                code: 4003,
                by_device: false,
            },
            Evidence::Reset,
            Evidence::Silent {
                pings_unanswered: 3,
                last_heard: earlier,
            },
            Evidence::NotBack { since: earlier },
        ];
        let unknown = Cause::ALL.map(Presence::Unknown);
        let states = offline
            .into_iter()
            .map(Presence::Offline)
            .chain(unknown)
            .chain([Presence::Online]);
        let mut kept = Kept::new(DeviceId::from_uuid(uuid::Uuid::from_u128(1)));
        assert_eq!(kept.known(), Known::NEVER_SEEN);
        for presence in states {
            let known = Known {
                epoch: SessionId(u64::MAX - 7),
                presence,
                since: at,
            };
            kept.set(known, Reason::of("draining"));
            kept.set_unsaved();

            assert_eq!((kept.known(), kept.reason().as_str()), (known, "draining"));
            assert_eq!(kept.state(), PresenceState::of(presence));
            assert!(kept.is_unsaved());
            kept.set_saved();
            assert_eq!(kept.known(), known);
        }
    }

    #[test]
    fn end_of_the_last_session_is_kept_to_the_second() {
        let mut kept = Kept::new(DeviceId::from_uuid(uuid::Uuid::from_u128(1)));
        let known = |presence| Known {
            epoch: SessionId(7),
            presence,
            since: WallTime::from_unix_ms(1),
        };
        kept.set(known(Presence::Offline(Evidence::Reset)), Reason::OTHER);
        assert_eq!(kept.ended(), None);
        kept.set_ended(Instant::from_micros(90_500_000), Past::of_bits(63));
        let past = Past::of_bits(63);
        assert_eq!(kept.ended(), Some((Instant::from_micros(90_000_000), past)));
        kept.set_ended(Instant::ZERO, Past::default());
        assert_eq!(kept.ended(), Some((Instant::ZERO, Past::default())));
        kept.set(known(Presence::Online), Reason::OTHER);
        assert_eq!(kept.session(), SessionId(7));
    }

    #[test]
    fn claimed_device_keeps_the_session_that_it_is_about() {
        let mut kept = Kept::new(DeviceId::from_uuid(uuid::Uuid::from_u128(1)));
        assert_eq!(kept.session(), Known::NEVER_SEEN.epoch);
        for ahead in [0, 1, 1 << 32, u64::MAX >> 2] {
            let known = Known {
                epoch: SessionId(u64::MAX),
                presence: Presence::Online,
                since: WallTime::from_unix_ms(1),
            };
            kept.set(known, Reason::CONNECTED);
            assert_eq!(kept.session(), known.epoch);

            kept.set_claim(SessionId(u64::MAX - ahead));

            assert_eq!((kept.session(), kept.known()), (SessionId(u64::MAX - ahead), known));
        }
    }
}
