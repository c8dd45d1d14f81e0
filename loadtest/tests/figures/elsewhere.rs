//! Storms that find nodes which have seen none of their devices: there are several of them, or the only one has lost its memory. They know
//! devices and tenants from their registry indexes alone. Medians of three seeds.

use super::{
    others::{alone, incident, of_few},
    *,
};

const STRANGERS: &str = "strangers_per_second = 10000\nstrangers_from = \"storm\"\n";

/// So many nodes, which can do together what one does in the other figures.
fn nodes(count: u32, more: &str) -> Storm {
    let part = |whole: u32| whole / count;
    Storm {
        admission: format!(
            "lookups_per_second_max = {}\nkeys_in_flight_max = {}",
            part(4_000),
            part(512)
        )
        .leak(),
        simulate: format!("nodes = {count}\nlast_known_good_per_second = {}\n{more}", part(2_000)).leak(),
        edge: format!("handshakes_per_second = {}", part(40_000)).leak(),
        ..Storm::default()
    }
}

/// A node that is gone for two seconds at the start of the storm, and returns with what is on its disk.
fn crashed(more: &str) -> Storm {
    let crash = incident(0, 0, "{ crash = { seconds = 2 } }");
    alone(&format!("{more}{crash}"))
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimisation")]
fn ten_thousand_strangers_a_second_leave_the_fleet_alone_on_several_nodes() {
    for count in [2, 4] {
        of_few(&nodes(count, STRANGERS)).assert_over_optimum(1.1);
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimisation")]
fn ten_thousand_strangers_a_second_leave_the_fleet_alone_after_a_crash() {
    let storm = Storm {
        edge: "handshakes_per_second = 30000",
        ..crashed(STRANGERS)
    };

    of_few(&storm).assert_over_optimum(1.1);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimisation")]
fn small_tenants_do_not_wait_behind_a_great_one_on_nodes_that_have_not_seen_them() {
    for storm in [nodes(4, ""), crashed("")] {
        let reports = of_few(&beside_a_great_tenant(storm));

        let median = reports.median(|report| figure(report, "seawall.small.b.p50_ms"));
        let p99 = reports.median(|report| figure(report, "seawall.small.b.p99_ms"));
        assert!(median <= 1_500.0, "{median}");
        assert!(p99 <= 5_000.0, "{p99}");
    }
}
