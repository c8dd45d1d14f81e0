use std::fs;

use super::{
    fleet::{quoted, split},
    timeline::CALM,
    *,
};
use crate::metrics::Metrics;

#[test]
fn figures_are_read_from_the_metrics() {
    let metrics = Metrics::parse(
        "seawall_sessions 7\n\
         seawall_handshakes_total{outcome=\"admitted\"} 9\n\
         seawall_handshakes_total{outcome=\"overloaded\"} 2\n\
         seawall_handshakes_total{outcome=\"unauthorized\"} 0\n\
         seawall_cohort_sessions{cohort=\"a/3.8.0-b2\"} 4\n\
         seawall_cohort_sessions{cohort=\"b/3.8.0-b2\"} 1\n\
         seawall_cohort_sessions{cohort=\"other\"} 2\n",
    );

    let figures = Figures::of(&metrics);

    assert_eq!((figures.connected, figures.admitted), (7, 9));
    assert_eq!(figures.refused, BTreeMap::from([("overloaded".to_owned(), 2)]));
    assert_eq!(
        figures.versions,
        BTreeMap::from([("3.8.0-b2".to_owned(), 5), ("other".to_owned(), 2)])
    );
}

#[test]
fn a_demo_ends_well_only_if_everyone_was_there_and_is_back() {
    let options = Options {
        devices: 10,
        has_storm: true,
        length: None,
    };
    let progress = Progress::new();
    let mut timeline = Timeline::default();
    let with = |connected| Figures {
        connected,
        ..Figures::default()
    };

    assert!(!timeline.advance(options, &with(9), &progress));
    assert!(
        timeline
            .judge(options, &with(9))
            .unwrap_err()
            .to_string()
            .contains("9 of 10")
    );
    assert!(!timeline.advance(options, &with(10), &progress));
    assert!(
        timeline
            .judge(options, &with(10))
            .unwrap_err()
            .to_string()
            .contains("no time for the storm")
    );
    timeline.all_connected_at = timeline.all_connected_at.map(|at| at - CALM);
    assert!(timeline.advance(options, &with(10), &progress));
    assert!(!timeline.advance(options, &with(10), &progress));
    assert!(
        timeline.judge(options, &with(10)).is_err(),
        "the gateway has not even seen the storm"
    );
    timeline.advance(options, &with(0), &progress);
    timeline.advance(options, &with(10), &progress);
    timeline.judge(options, &with(10)).unwrap();

    let refused = BTreeMap::from([("unauthorized".to_owned(), 1)]);
    assert!(timeline.judge(options, &Figures { refused, ..with(10) }).is_err());
}

#[test]
fn devices_are_split_over_at_least_two_processes() {
    let folder = tempfile::tempdir().unwrap();
    let all = folder.path().join("all.csv");
    for (count, parts) in [(1, 1), (10, 2), (10_001, 3)] {
        let rows: Vec<String> = (0..count).map(|n| format!("{n},s")).collect();
        fs::write(&all, format!("id,secret\n{}\n", rows.join("\n"))).unwrap();

        let files = split(&all, folder.path()).unwrap();

        assert_eq!(files.len(), parts);
        let lines: usize = files
            .iter()
            .map(|file| fs::read_to_string(file).unwrap().lines().count() - 1)
            .sum();
        assert_eq!(lines, count);
    }
}

#[test]
fn a_path_is_quoted_for_the_shell_only_where_it_must_be() {
    assert_eq!(quoted(Path::new("/tmp/a-b/c.d")), "/tmp/a-b/c.d");
    assert_eq!(quoted(Path::new("/tmp/it's here")), r"'/tmp/it'\''s here'");
}
