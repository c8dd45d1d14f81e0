//! Cost of look-ups and message rates: seconds in which a cohort is far above the others.

use super::decay;

/// Share of such seconds that is normal, and the share that the test is tuned for.
const NORMAL: f64 = 0.01;
const BAD: f64 = 0.1;
/// Score from which a cohort is proposed.
const PROPOSE: f64 = 25.0;
const SCORE_MAX: f64 = 4.0 * PROPOSE;

/// Multiple of the others' time from which look-ups are dear.
const DEAR_FACTOR: f64 = 5.0;
/// Maximum of that multiple in one second.
const RATIO_MAX: f64 = 10.0;
/// Weight of the average before one more look-up, and the number of look-ups in a second that weigh.
const KEPT: f64 = 0.95;
const KEYS_MAX: u32 = 20;
/// Least time of a dear look-up, in microseconds: 10 ms.
const DEAR_MICROS_MIN: f64 = 10_000.0;
/// Number of look-ups in a second that count as separate samples. More of them are often in one statement.
const SAMPLES_MAX: u32 = 3;
/// Least number of look-ups of others in the same second.
const OTHERS_MIN: u64 = 5;
/// Least number of dear look-ups within the last minute.
const DEAR_IMPACT_MIN: f64 = 20.0;

/// Multiple of the usual peak from which a message rate is loud.
const LOUD_FACTOR: f64 = 10.0;
/// Least number of messages per second of a cohort that is loud.
const LOUD_MESSAGES_MIN: f64 = 20.0;
/// Time for which a new cohort's message rates are learned, in seconds.
const LEARN_FIRST: f64 = 3_600.0;
/// Time in which a learned peak doubles at most, in seconds.
const DOUBLING: f64 = 86_400.0;
/// Time constant of the usual peak, in seconds.
const PEAK: f64 = 86_400.0;

const MINUTE: f64 = 60.0;

/// A cohort's look-ups in a second.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lookups {
    pub keys: u32,
    pub micros: u64,
}

impl Lookups {
    fn each_micros(self) -> f64 {
        self.micros as f64 / f64::from(self.keys.max(1))
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Score(f64);

impl Score {
    /// Adds `samples` seconds or look-ups that were all far above the others, or none of them.
    fn add(&mut self, is_far_above: bool, samples: f64) {
        let each = if is_far_above {
            (BAD / NORMAL).ln()
        } else {
            ((1.0 - BAD) / (1.0 - NORMAL)).ln()
        };
        self.0 = (self.0 + samples * each).clamp(0.0, SCORE_MAX);
    }
}

/// Figure, expected figure and score of a cohort that stands out.
pub(super) type Found = (f64, f64, f64);

/// Cost of the look-ups of one cohort.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cost {
    score: Score,
    /// Number of dear look-ups within the last minute, and the second of the last change.
    dear: f64,
    dear_at: u64,
    /// Averages of the cohort and of the others, in microseconds. They begin at zero: what is new is not dear.
    own: f64,
    others: f64,
    /// Average of the ratio of the two, each at most [`RATIO_MAX`]: one statement that was held up is not dear.
    ratio: f64,
}

impl Cost {
    /// Compares a second's look-ups with those of others: `others` keys with this median time.
    pub fn handle_second(&mut self, own: Lookups, others: u64, median_micros: f64, now: u64) -> Option<Found> {
        (self.dear, self.dear_at) = (self.dear(now), now);
        if own.keys == 0 || others < OTHERS_MIN {
            return None;
        }
        let each = own.each_micros();
        let samples = own.keys.min(SAMPLES_MAX);
        let kept = KEPT.powi(own.keys.min(KEYS_MAX).cast_signed());
        let average = |before: f64, fresh: f64| before * kept + fresh * (1.0 - kept);
        self.own = average(self.own, each);
        self.others = average(self.others, median_micros);
        self.ratio = average(self.ratio, (each / median_micros.max(1.0)).min(RATIO_MAX));
        let is_dear = self.ratio > DEAR_FACTOR && self.own >= DEAR_MICROS_MIN;
        self.score.add(is_dear, samples.into());
        if is_dear {
            self.dear += f64::from(own.keys);
        }
        let stands_out = self.score.0 > PROPOSE && self.dear >= DEAR_IMPACT_MIN;
        stands_out.then_some((self.own / 1e3, self.others / 1e3, self.score.0))
    }

    /// Score relative to that of a proposal; 0 without dear look-ups within the last minutes.
    pub fn stands_out(&self, now: u64) -> f64 {
        if self.dear(now) >= 1.0 {
            self.score.0 / PROPOSE
        } else {
            0.0
        }
    }

    /// Whether it had dear look-ups within the last minutes.
    pub fn is_bad(&self, now: u64) -> bool {
        self.dear(now) >= 1.0 && self.score.0 > PROPOSE / 2.0
    }

    fn dear(&self, now: u64) -> f64 {
        self.dear * decay(now.saturating_sub(self.dear_at) as f64, MINUTE)
    }
}

/// Look-ups of all cohorts in one second, by the time of each.
#[derive(Debug, Default)]
pub(super) struct Sorted {
    lookups: Vec<(u32, Lookups)>,
    /// Number of keys up to and with each.
    keys: Vec<u64>,
}

impl Sorted {
    pub fn new(mut lookups: Vec<(u32, Lookups)>) -> Self {
        lookups.sort_by(|(_, left), (_, right)| left.each_micros().total_cmp(&right.each_micros()));
        let mut sum = 0;
        let keys = lookups.iter().map(|(_, lookups)| {
            sum += u64::from(lookups.keys);
            sum
        });
        Self {
            keys: keys.collect(),
            lookups,
        }
    }

    /// Each cohort with its look-ups, the number of all others, and their median time in microseconds.
    pub fn compared(&self) -> impl Iterator<Item = (u32, Lookups, u64, f64)> {
        let total = self.keys.last().copied().unwrap_or(0);
        self.lookups.iter().enumerate().map(move |(place, (slot, own))| {
            let others = total - u64::from(own.keys);
            let up_to = |at: usize| self.keys[at] - if at >= place { u64::from(own.keys) } else { 0 };
            let (mut low, mut high) = (0, self.lookups.len());
            while low < high {
                let middle = low.midpoint(high);
                if 2 * up_to(middle) >= others && up_to(middle) > 0 {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            let median = self.lookups.get(low).map_or(0.0, |(_, lookups)| lookups.each_micros());
            (*slot, *own, others, median)
        })
    }
}

/// Message rate of one cohort, per device.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Messages {
    score: Score,
    /// Messages per device and second, over a minute.
    rate: f64,
    /// Highest rate that was usual.
    peak: f64,
    /// Time for which it was learned, in seconds.
    age: f64,
    /// Whether it was loud at the last look.
    is_loud: bool,
}

impl Messages {
    /// `of_model`: the usual peak of other cohorts of its model, where there is one.
    pub fn handle_second(&mut self, messages: f64, devices: f64, of_model: Option<f64>, elapsed: f64) -> Option<Found> {
        let kept = decay(elapsed, MINUTE);
        self.rate = self.rate * kept + messages / elapsed / devices.max(1.0) * (1.0 - kept);
        self.age += elapsed;
        let usual = if self.age >= LEARN_FIRST {
            Some(self.peak)
        } else {
            of_model
        };
        let is_loud = usual.is_some_and(|usual| {
            usual > 0.0 && self.rate > LOUD_FACTOR * usual && self.rate * devices >= LOUD_MESSAGES_MIN
        });
        self.score.add(is_loud, 1.0);
        self.is_loud = is_loud;
        if !is_loud {
            // Once it is learned, it rises slowly: what grows for hours is not usual for that.
            let is_learned = self.age >= LEARN_FIRST && self.peak > 0.0;
            let peak_max = if is_learned {
                self.peak * (elapsed / DOUBLING).exp2()
            } else {
                f64::MAX
            };
            self.peak = (self.peak * decay(elapsed, PEAK)).max(self.rate.min(peak_max));
        }
        let stands_out = is_loud && self.score.0 > PROPOSE;
        stands_out.then_some((self.rate * MINUTE, usual.unwrap_or(0.0) * MINUTE, self.score.0))
    }

    /// The usual peak, once it is learned.
    pub fn usual(&self) -> Option<f64> {
        (self.age >= LEARN_FIRST).then_some(self.peak)
    }

    pub fn is_bad(&self) -> bool {
        self.is_loud && self.score.0 > PROPOSE
    }

    /// Score relative to that of a proposal; 0 while it is not loud.
    pub fn stands_out(&self) -> f64 {
        if self.is_loud { self.score.0 / PROPOSE } else { 0.0 }
    }
}
