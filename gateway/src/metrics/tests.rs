//! The catalog and its page.

use super::*;

#[test]
fn the_page_of_metrics_is_what_the_code_defines() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/METRICS.md");
    let text = Metrics::new().document();

    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &text).unwrap();
    }

    assert_eq!(
        std::fs::read_to_string(path).unwrap(),
        text,
        "run UPDATE=1 cargo test -p seawall-gateway metrics"
    );
}

#[test]
fn every_handshake_outcome_is_a_series_from_the_start() {
    let metrics = Metrics::new();

    let text = metrics.render();

    for outcome in ["admitted", "restricted", "abandoned", "firmware_blocked", "overloaded"] {
        assert!(
            text.contains(&format!("seawall_handshakes_total{{outcome=\"{outcome}\"}} 0")),
            "{outcome}: {text}"
        );
    }
}

#[test]
fn two_gateways_in_one_process_count_apart() {
    let (one, other) = (Metrics::new(), Metrics::new());

    one.lookups.increment("found");

    assert!(one.render().contains("seawall_lookups_total{outcome=\"found\"} 1"));
    assert!(other.render().contains("seawall_lookups_total{outcome=\"found\"} 0"));
}
