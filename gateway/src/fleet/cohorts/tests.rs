use seawall_proto::refusal::Code;

use super::*;

#[test]
fn strangers_cannot_make_a_cohort() {
    let cohorts = Cohorts::new();

    cohorts
        .known(None, Some("evil"))
        .attempted(Outcome::Refused(Code::Unauthorized));

    assert_eq!(cohorts.rows().len(), 1);
    assert!(
        cohorts
            .render()
            .contains("cohort=\"other\",outcome=\"unauthorized\"} 1")
    );
}

#[test]
fn series_are_bounded_and_do_not_flap() {
    let cohorts = Cohorts::new();
    for n in 0..60 {
        let cohort = cohorts.intern(Some("m"), Some(&format!("1.{n}")));
        (0..100).for_each(|_| cohort.session_opened());
    }
    let first = cohorts.render();

    cohorts.intern(Some("m"), Some("1.59")).session_opened();
    let second = cohorts.render();
    (0..50).for_each(|_| cohorts.intern(Some("m"), Some("1.59")).session_opened());
    let third = cohorts.render();

    assert_eq!(first.matches("seawall_cohort_sessions{").count(), SERIES_MAX + 1);
    let names = |text: &str| text.lines().filter(|l| l.starts_with("seawall_cohort_s")).count();
    assert_eq!(names(&second), names(&first));
    assert!(!second.contains("m/1.59"), "one session more is not enough");
    assert!(third.contains("m/1.59"), "half as many more is");
}

#[test]
fn costs_are_of_the_cohorts_whose_devices_are_looked_up_under_that_tag() {
    let cohorts = Cohorts::new();
    let claimed = |model| CohortTag::of(model, Some("3.8.0"));
    let [named, written_otherwise, left, other] = [
        cohorts.intern(Some("a"), Some("3.8.0")),
        cohorts.intern(Some("a"), Some("v3.8+serial17")),
        cohorts.intern(Some("b"), Some("3.8.0")),
        cohorts.intern(Some("a"), Some("3.8.1")),
    ];
    for cohort in [&named, &written_otherwise, &other] {
        cohort.claimed_as(cohort.tag().claimed());
    }
    left.claimed_as(claimed(None));

    let costly_under = |tag| [&named, &written_otherwise, &left, &other].map(|cohort| cohort.is_claimed_as(tag));

    assert_eq!(costly_under(claimed(Some("a"))), [true, true, false, false]);
    assert_eq!(costly_under(claimed(None)), [false, false, true, false]);
    assert_eq!(costly_under(claimed(Some("b"))), [false; 4]);
    assert_eq!(named.tag(), written_otherwise.tag());
    assert_ne!(named.name(), written_otherwise.name());
}

#[test]
fn rows_are_bounded_and_idle_ones_make_room() {
    let cohorts = Cohorts::new();
    for n in 0..COHORTS_MAX {
        cohorts.intern(None, Some(&n.to_string())).session_opened();
    }

    let beyond = cohorts.intern(None, Some("beyond"));
    beyond.session_opened();
    assert_eq!(
        beyond.firmware.as_deref(),
        Some("beyond"),
        "rules still see the version"
    );
    assert_eq!(cohorts.rows().last().unwrap().sessions(), 1);
    beyond.session_closed();
    cohorts.known(None, Some("7")).session_closed();

    assert_eq!(cohorts.intern(None, Some("beyond")).name(), "(none)/beyond");
    assert!(cohorts.known(None, Some("7")).firmware.is_none(), "its row went");
    assert_eq!(cohorts.rows().len(), COHORTS_MAX + 1);
}

#[test]
fn full_table_of_tenants_is_looked_through_once_for_many_names_that_find_no_room() {
    let mut tenants = Tenants::default();
    let name = |n: usize| -> Arc<str> { n.to_string().into() };
    let mut held: Vec<_> = (0..TENANTS_MAX).map(|n| tenants.share(&name(n))).collect();
    tenants.share(&name(TENANTS_MAX));
    assert!(!tenants.names.contains("10000"), "all have devices");
    held.clear();

    for n in 1..TENANT_MISSES_PER_LOOK {
        tenants.share(&name(TENANTS_MAX + n));
        assert_eq!(tenants.names.len(), TENANTS_MAX);
    }
    tenants.share(&name(2 * TENANTS_MAX));

    assert_eq!(tenants.names.len(), 1, "those that nobody has any more are forgotten");
}

#[test]
fn labels_are_escaped_and_short() {
    assert_eq!(label("a\"b\\c"), "a\\\"b\\\\c");
    assert!((60..=64).contains(&label(&"\"".repeat(100)).len()));
    assert_eq!(label(&"m".repeat(64)).len(), 64);
    assert_eq!(label(&"m".repeat(65)).len(), 64);
}

#[test]
fn no_two_cohorts_have_one_series() {
    let cohorts = Cohorts::new();
    let long = "m".repeat(64);
    let names = [
        (Some(long.as_str()), Some("1.0")),
        (Some(long.as_str()), Some("2.0")),
        (Some("a"), Some("b/c")),
        (Some("a/b"), Some("c")),
        (Some("a%2Fb"), Some("c")),
        (None, Some("9")),
        (Some("(none)"), Some("9")),
        (Some("%28none%29"), Some("9")),
        (Some("m"), None),
        (Some("m"), Some("(none)")),
        (Some("m"), Some("%28none%29")),
    ];
    for (model, firmware) in names {
        let cohort = cohorts.intern(model, firmware);
        cohort.session_opened();
        cohort.attempted(Outcome::Admitted);
    }
    let text = cohorts.render();

    let series: Vec<&str> = text
        .lines()
        .filter_map(|line| line.rsplit_once(' '))
        .map(|(name, _)| name)
        .collect();
    let distinct: std::collections::BTreeSet<&str> = series.iter().copied().collect();
    assert_eq!(series.len(), distinct.len(), "{text}");
}

#[test]
fn counters_never_fall_when_a_cohort_gets_series_of_its_own() {
    let cohorts = Cohorts::new();
    let figure = |text: &str| -> u64 {
        let lines = text
            .lines()
            .filter(|line| line.starts_with("seawall_cohort_handshakes_total"));
        lines
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
            .sum()
    };
    let other = |text: &str| -> u64 {
        let line = text
            .lines()
            .find(|line| line.starts_with("seawall_cohort_handshakes_total{cohort=\"other\""));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0)
    };
    for n in 0..60 {
        let cohort = cohorts.intern(Some("m"), Some(&format!("1.{n}")));
        (0..100).for_each(|_| cohort.session_opened());
        (0..5).for_each(|_| cohort.attempted(Outcome::Admitted));
    }
    let before = cohorts.render();
    assert_eq!(figure(&before), 300);

    let grown = cohorts.intern(Some("m"), Some("1.59"));
    (0..500).for_each(|_| grown.session_opened());
    (0..7).for_each(|_| grown.attempted(Outcome::Admitted));
    let after = cohorts.render();

    // What was counted under `other` stays there, and the cohort that made room takes its own series along.
    assert!(after.contains("cohort=\"m/1.59\",outcome=\"admitted\"} 7"), "{after}");
    assert_eq!(figure(&after), 300 + 7 - 5);
    assert!(
        other(&after) >= other(&before),
        "{} fell to {}",
        other(&before),
        other(&after)
    );
}
