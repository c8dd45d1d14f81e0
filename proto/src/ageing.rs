//! How long a session may live, so that a fleet that has connected together does not stay together.
//!
//! A session ends after its [life](Ageing::life_of): the configured one, a quarter more or less by its id. Its device comes back at a
//! slot. How many may end is [`Ageing::take_due`]: so few that nobody notices, and none in a storm. Which ones are due, and what each
//! is told, is the caller's.

use std::time::Duration;

use crate::{id::SessionId, time::Instant};

/// Lives are spread by this part of the configured one to both sides.
const SPREAD: f64 = 0.25;
/// This part of the live sessions may end in a minute for long. With what is saved up never more than a thousandth does in any
/// minute (overload.md section 10); a life of 24 h needs 0.07 %.
const SHARE_PER_MINUTE: f64 = 0.000_9;
/// What was not used up counts for at most so long.
const ALLOWANCE_SPAN: Duration = Duration::from_secs(5);

/// Says how many sessions may end because of their age.
#[derive(Clone, Debug, PartialEq)]
pub struct Ageing {
    life: Duration,
    allowance: f64,
    last: Instant,
}

impl Ageing {
    /// Sessions live for `life` on average. The first may end at once.
    #[must_use]
    pub fn new(life: Duration, now: Instant) -> Self {
        Self {
            life,
            allowance: 1.0,
            last: now,
        }
    }

    /// How long this session may live: the same whenever it is asked.
    #[must_use]
    pub fn life_of(&self, session: SessionId) -> Duration {
        let part = scattered(session.0) as f64 / u64::MAX as f64;
        self.life.mul_f64(1.0 - SPREAD + 2.0 * SPREAD * part)
    }

    /// How many of the `due` sessions may end now, of `sessions` that are live; they count as ended. In a storm, that is, while
    /// devices wait or the database is in trouble, none may, and nothing is saved up.
    pub fn take_due(&mut self, due: usize, sessions: usize, is_calm: bool, now: Instant) -> usize {
        let span = now.saturating_since(self.last).min(ALLOWANCE_SPAN);
        self.last = self.last.max(now);
        if !is_calm {
            self.allowance = 0.0;
            return 0;
        }
        let per_minute = sessions as f64 * SHARE_PER_MINUTE;
        let earned = per_minute * span.as_secs_f64() / 60.0;
        let saved_max = per_minute * ALLOWANCE_SPAN.as_secs_f64() / 60.0;
        // And the part of a session that the last pass left over.
        self.allowance = (self.allowance + earned).min(saved_max + 1.0);
        let taken = (self.allowance.floor() as usize).min(due);
        self.allowance -= taken as f64;
        taken
    }
}

/// Neighbouring numbers far apart (the finalizer of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
const fn scattered(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);
    const PASS: Duration = Duration::from_secs(5);

    #[test]
    fn lives_are_spread_evenly_over_a_quarter_to_both_sides() {
        let ageing = Ageing::new(DAY, Instant::ZERO);

        let hours: Vec<f64> = (0..100_000)
            .map(|n| ageing.life_of(SessionId(n)).as_secs_f64() / 3_600.0)
            .collect();

        assert!(hours.iter().all(|hours| (18.0..=30.0).contains(hours)));
        for hour in 18..30 {
            let begun = f64::from(hour);
            let share = hours
                .iter()
                .filter(|&&hours| hours >= begun && hours < begun + 1.0)
                .count();
            assert!((7_900..=8_800).contains(&share), "{share} end in hour {hour}");
        }
        assert_eq!(ageing.life_of(SessionId(7)), ageing.life_of(SessionId(7)));
    }

    #[test]
    fn at_most_a_thousandth_ends_in_any_minute() {
        let mut ageing = Ageing::new(DAY, Instant::ZERO);
        let mut now = Instant::ZERO;
        let mut taken = Vec::new();

        for pass in 0..1_200 {
            now += PASS;
            // For ten minutes nobody is old enough.
            let due = if (100..220).contains(&pass) { 0 } else { 50_000 };
            taken.push(ageing.take_due(due, 50_000, true, now));
        }

        assert!(
            taken.windows(12).all(|minute| minute.iter().sum::<usize>() <= 50),
            "{taken:?}"
        );
        let minutes = (1_200 - 120) / 12;
        assert!((minutes * 44..=minutes * 46).contains(&taken.iter().sum::<usize>()));
        now += DAY;
        assert!(
            ageing.take_due(50_000, 50_000, true, now) <= 4,
            "a late caller gets no burst"
        );
    }

    #[test]
    fn nobody_ends_in_a_storm_and_nothing_is_saved_up_for_after_it() {
        let mut ageing = Ageing::new(DAY, Instant::ZERO);
        let storm = Instant::ZERO + Duration::from_secs(3_600);

        assert_eq!(ageing.take_due(50_000, 50_000, false, storm), 0);

        assert_eq!(ageing.take_due(50_000, 50_000, true, storm), 0);
        assert_eq!(ageing.take_due(50_000, 50_000, true, storm + PASS), 3);
    }

    #[test]
    fn few_sessions_end_too_only_seldom() {
        let mut ageing = Ageing::new(DAY, Instant::ZERO);
        let mut now = Instant::ZERO;
        let mut taken = 0;

        while now < Instant::ZERO + DAY {
            now += PASS;
            taken += ageing.take_due(10, 10, true, now);
        }

        // 10 sessions, 0.09 % a minute, 1,440 minutes.
        assert!((13..=14).contains(&taken), "{taken}");
    }
}
