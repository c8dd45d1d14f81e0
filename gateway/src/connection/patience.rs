//! How long one step of a handshake may take, and what becomes of one that is late. Start with [`Patience`].

use std::time::{Duration, Instant};

use crate::door::{ASIDE_AFTER, Door, Handshake, LATE_AFTER, Late, Sent};

/// A step that has taken this part of its time counts as slow: over half of the places in use, its address then gets no more
/// than a fair share of them. Not sooner, since a crowd that comes back at once has slow ones too.
const SLOW_AFTER_PART: u32 = 2;

/// Why a step is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hurry {
    /// Its time is over.
    TimedOut,
    /// Others wait because of its address, or because of it.
    MakeWay,
}

/// The time of one step.
pub(super) struct Patience<'a> {
    door: &'a Door,
    handshake: &'a mut Handshake,
    begun: Instant,
    time_max: Duration,
    slow_after: Duration,
    has_been_spared: bool,
}

impl<'a> Patience<'a> {
    /// `time_usual` is what a step gets whose address is not refused already: `time_max` may be less.
    pub(super) fn begin(
        door: &'a Door,
        handshake: &'a mut Handshake,
        time_max: Duration,
        time_usual: Duration,
    ) -> Self {
        Self {
            door,
            handshake,
            begun: Instant::now(),
            time_max: time_max.min(time_usual),
            slow_after: time_usual / SLOW_AFTER_PART,
            has_been_spared: false,
        }
    }

    /// Wait for so long, then [`look`](Self::look).
    pub(super) fn span(&self) -> Duration {
        let elapsed = self.begun.elapsed();
        let soon = if elapsed < ASIDE_AFTER { ASIDE_AFTER } else { LATE_AFTER };
        self.time_max.saturating_sub(elapsed).min(soon)
    }

    /// Takes the room that a peer needs which begins to send. False where there is none yet.
    pub(super) fn try_begin(&mut self) -> bool {
        self.door.try_begin(self.handshake)
    }

    /// Whether the step may go on. `has_unread`: on a busy machine its bytes may have come without being read; that counts once.
    pub(super) fn look(&mut self, sent: Sent, has_unread: impl FnOnce() -> bool) -> Result<(), Hurry> {
        if self.begun.elapsed() >= self.time_max {
            return Err(Hurry::TimedOut);
        }
        if self.begun.elapsed() >= self.slow_after {
            self.handshake.mark_slow();
        }
        if self.door.make_way(self.handshake, self.begun.elapsed(), sent) == Late::Leave {
            if self.has_been_spared || !has_unread() {
                return Err(Hurry::MakeWay);
            }
            self.has_been_spared = true;
        }
        Ok(())
    }
}
