use std::fs;

use super::{
    fleet::{quoted, split},
    story::CALM,
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
    let mut story = Story::default();
    let with = |connected| Figures {
        connected,
        ..Figures::default()
    };

    assert!(!story.advance(options, &with(9), &progress));
    assert!(
        story
            .judge(options, &with(9))
            .unwrap_err()
            .to_string()
            .contains("9 of 10")
    );
    assert!(!story.advance(options, &with(10), &progress));
    assert!(
        story
            .judge(options, &with(10))
            .unwrap_err()
            .to_string()
            .contains("no time for the storm")
    );
    story.all_connected_at = story.all_connected_at.map(|at| at - CALM);
    assert!(story.advance(options, &with(10), &progress));
    assert!(!story.advance(options, &with(10), &progress));
    assert!(
        story.judge(options, &with(10)).is_err(),
        "the gateway has not even seen the storm"
    );
    story.advance(options, &with(0), &progress);
    story.advance(options, &with(10), &progress);
    story.judge(options, &with(10)).unwrap();

    let refused = BTreeMap::from([("unauthorized".to_owned(), 1)]);
    assert!(story.judge(options, &Figures { refused, ..with(10) }).is_err());
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
