//! Slow drift over a phase: how fast a figure grows or falls, as far as its samples prove it.
//!
//! The slope is that of Theil and Sen: the median of the slopes between all pairs of points. Single outliers do not
//! change it. Its 95 % confidence interval is Sen's (1968), by the variance of Kendall's S. The end nearer to zero is
//! taken, so that noise alone gives 0. Start with [`per_hour`].

use crate::report::{Drift, Second};

/// Number of points that a phase is reduced to: each is the median of its stretch of time.
const POINTS: usize = 48;
/// Fewest points that prove anything.
const POINTS_MIN: usize = 8;
/// Quantile of the normal distribution for 95 %, on both sides.
const Z: f64 = 1.96;
const SECONDS_PER_HOUR: f64 = 3_600.0;

impl Drift {
    /// Drift of a phase, from the samples of its seconds.
    #[must_use]
    pub fn of(seconds: &[Second], starts_seconds: f64, length_seconds: f64) -> Self {
        let ends = starts_seconds + length_seconds;
        // The seconds in which it begins and ends are also other phases'.
        let of_phase = |second: &&Second| second.at_seconds > starts_seconds && second.at_seconds + 1.0 < ends;
        let within: Vec<&Second> = seconds.iter().filter(of_phase).collect();
        let drift = |value: &dyn Fn(&Second) -> Option<f64>| {
            let points = within
                .iter()
                .filter_map(|second| Some((second.at_seconds, value(second)?)));
            per_hour(&points.collect::<Vec<_>>())
        };
        #[expect(clippy::cast_precision_loss, reason = "bytes and counts are far below 2^52")]
        let float = |value: Option<u64>| value.map(|value| value as f64);
        #[expect(clippy::cast_precision_loss, reason = "counts of a second are far below 2^52")]
        let mean_connect = |second: &Second| (second.connects > 0).then(|| second.connect_ms / second.connects as f64);
        Self {
            hours: length_seconds / SECONDS_PER_HOUR,
            rss_bytes_per_hour: drift(&|second| float(second.rss_bytes)),
            handles_per_hour: drift(&|second| float(second.handles)),
            threads_per_hour: drift(&|second| float(second.threads)),
            connect_ms_per_hour: drift(&mean_connect),
            presence_per_hour: drift(&|second| second.presence_error),
        }
    }
}

/// Proven slope of `(seconds, value)` points, per hour. Points are ordered by time.
/// 0 if the points are as likely without any drift. `None`: there are too few.
#[must_use]
pub fn per_hour(points: &[(f64, f64)]) -> Option<f64> {
    let points = reduced(points);
    let n = points.len();
    if n < POINTS_MIN {
        return None;
    }
    let mut slopes = Vec::with_capacity(n * (n - 1) / 2);
    for (index, (at, value)) in points.iter().enumerate() {
        for (later, later_value) in points.iter().skip(index + 1).filter(|(later, _)| later > at) {
            slopes.push((later_value - value) / (later - at));
        }
    }
    slopes.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "at most 48 points")]
    let (n, pairs) = (n as f64, slopes.len() as f64);
    let margin = Z * (n * (n - 1.0) * (2.0 * n + 5.0) / 18.0).sqrt();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a place in a list, clamped to it"
    )]
    let at = |place: f64| slopes.get(place.clamp(0.0, pairs - 1.0) as usize).copied();
    let (low, high) = (at((pairs - margin) / 2.0)?, at((pairs + margin) / 2.0)?);
    let nearest = if low > 0.0 {
        low
    } else if high < 0.0 {
        high
    } else {
        0.0
    };
    Some(nearest * SECONDS_PER_HOUR)
}

/// At most [`POINTS`], over equal numbers of points: the median of each.
fn reduced(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let each = points.len().div_ceil(POINTS).max(1);
    let middle = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    points
        .chunks(each)
        .filter_map(|some| {
            let at = middle(some.iter().map(|point| point.0).collect())?;
            let value = middle(some.iter().map(|point| point.1).collect())?;
            Some((at, value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    const MIB: f64 = 1_048_576.0;

    /// A figure of 100 MiB that grows by `drift` per hour, with `noise` around it.
    fn series(seconds: u32, drift: f64, noise: f64, seed: u64) -> Vec<(f64, f64)> {
        let mut rng = StdRng::seed_from_u64(seed);
        let value = |second: f64, rng: &mut StdRng| {
            100.0 * MIB + drift * second / SECONDS_PER_HOUR + noise * (rng.random::<f64>() - 0.5)
        };
        (0..seconds)
            .map(|second| (f64::from(second), value(f64::from(second), &mut rng)))
            .collect()
    }

    #[test]
    fn slow_leak_is_found_within_an_hour_though_noise_is_as_great() {
        for seed in 0..20 {
            let found = per_hour(&series(3_600, 2.0 * MIB, 2.0 * MIB, seed)).unwrap();

            assert!(
                (1.2 * MIB..=2.2 * MIB).contains(&found),
                "seed {seed}: {} MiB",
                found / MIB
            );
        }
    }

    #[test]
    fn noise_alone_is_hardly_ever_drift() {
        let found = (0..200).filter(|seed| per_hour(&series(600, 0.0, 4.0 * MIB, *seed)) != Some(0.0));

        // One in twenty is what 95 % allows.
        assert!(found.count() <= 20);
    }

    #[test]
    fn outliers_do_not_hide_a_leak_and_make_none() {
        let mut leaking = series(3_600, 20.0 * MIB, MIB, 1);
        let mut steady = series(3_600, 0.0, MIB, 2);
        for series in [&mut leaking, &mut steady] {
            for point in series.iter_mut().filter(|point| point.0 % 400.0 < 40.0) {
                point.1 += 500.0 * MIB;
            }
        }

        assert!(per_hour(&leaking).unwrap() > 15.0 * MIB);
        assert!(per_hour(&steady).unwrap().abs() < MIB);
    }

    #[test]
    fn falling_figure_drifts_downwards_and_a_constant_one_not_at_all() {
        let falling: Vec<(f64, f64)> = (0..100).map(|n| (f64::from(n), 1_000.0 - f64::from(n))).collect();
        let constant: Vec<(f64, f64)> = (0..100).map(|n| (f64::from(n), 7.0)).collect();

        assert_eq!(per_hour(&falling), Some(-SECONDS_PER_HOUR));
        assert_eq!(per_hour(&constant), Some(0.0));
        assert_eq!(per_hour(&constant[..5]), None, "too few to prove anything");
    }

    #[test]
    fn phase_is_judged_by_its_own_seconds() {
        let seconds: Vec<Second> = (0..300_u32)
            .map(|n| Second {
                at_seconds: f64::from(n),
                // Grows in the first hundred seconds only.
                rss_bytes: Some(u64::from(n.min(100)) * 1_000),
                threads: Some(9),
                ..Second::default()
            })
            .collect();

        let (warm_up, steady) = (Drift::of(&seconds, 0.0, 100.0), Drift::of(&seconds, 100.0, 200.0));

        assert_eq!(warm_up.rss_bytes_per_hour, Some(3_600_000.0));
        assert_eq!(
            (steady.rss_bytes_per_hour, steady.threads_per_hour),
            (Some(0.0), Some(0.0))
        );
        assert_eq!((steady.connect_ms_per_hour, steady.handles_per_hour), (None, None));
    }
}
