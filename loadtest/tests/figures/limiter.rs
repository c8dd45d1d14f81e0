//! The limit on keys in flight beside the best fixed one, before the same database.

use std::time::Duration;

use loadtest::{
    scenario::Trouble,
    simulate::database::{Curve, Database, StatementId},
};
use rand::{SeedableRng, rngs::SmallRng};
use seawall_proto::time::Instant;

use super::*;

const KNEES: [u32; 3] = [8, 32, 128];
/// What each key beyond the knee costs, as in the model that the bound comes from (docs/design/limiter.md).
const OVERLOAD: f64 = 0.004;
/// Fixed limits that the one found must compare with.
const FIXED: [u32; 14] = [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512];
/// Seeds of which the median is taken: over five, one or two lucky ones decide.
const SEEDS_MANY: std::ops::RangeInclusive<u64> = 1..=15;
/// Of each of the three phases.
const SPAN: f64 = 20.0;
const SLOW: Trouble = Trouble::Slow { factor: 4.0 };

/// Keys per second where two statements of half of `keys` each are always under way.
fn fixed(curve: Curve, trouble: Option<Trouble>, keys: u32) -> f64 {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut database = Database::new(curve);
    database.set_trouble(trouble, Instant::ZERO);
    for number in 0..2 {
        database.start(StatementId(number), keys / 2, 0.0, Instant::ZERO, &mut rng);
    }
    let (mut now, mut answered) = (Instant::ZERO, 0_u32);
    let end = Instant::ZERO + Duration::from_secs_f64(SPAN);
    while let Some(at) = database.poll_timeout().filter(|at| *at < end) {
        now = at.max(now);
        while let Some(done) = database.poll_done(now) {
            answered += keys / 2;
            database.start(done, keys / 2, 0.0, now, &mut rng);
        }
    }
    f64::from(answered) / SPAN
}

fn best_fixed(curve: Curve, trouble: Option<Trouble>) -> f64 {
    FIXED
        .map(|keys| fixed(curve, trouble, keys))
        .into_iter()
        .fold(0.0, f64::max)
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimisation")]
fn limit_that_is_found_gives_nine_tenths_of_the_best_fixed_one_healthy_slow_and_recovered() {
    for knee in KNEES {
        let curve = Curve {
            keys_per_second: CAPACITY,
            knee: f64::from(knee),
            overload: OVERLOAD,
        };
        let storm = Storm {
            admission: "lookups_per_second_max = 4000\nkeys_in_flight_max = 512",
            database: format!("knee = {knee}\noverload = {OVERLOAD}").leak(),
            phases: "[[phase]]\nname = \"healthy\"\nseconds = 20\naction = \"drop-all\"\n\
                     [[phase]]\nname = \"slow\"\nseconds = 20\naction = { database = { slow = { factor = 4 } } }\n\
                     [[phase]]\nname = \"recovered\"\nseconds = 20\n\
                     [[phase]]\nname = \"after\"\nseconds = 900\nuntil = \"connected\"\n",
            ..Storm::default()
        };
        let reports = Reports(SEEDS_MANY.map(|seed| storm.report(seed)).collect());

        for (phase, trouble) in [("healthy", None), ("slow", Some(SLOW)), ("recovered", None)] {
            let best = best_fixed(curve, trouble);
            let goodput = reports.median(|report| figure(report, &format!("seawall.{phase}.all.admitted")) / SPAN);
            println!("knee {knee}, {phase}: {goodput:.0} of {best:.0}, {:.3}", goodput / best);
            assert!(goodput >= 0.9 * best, "knee {knee}, {phase}: {goodput} of {best}");
        }
        let in_flight = reports.median(|report| report.summary.in_flight_max);
        assert!(in_flight <= 512.0, "{in_flight}");
    }
}
