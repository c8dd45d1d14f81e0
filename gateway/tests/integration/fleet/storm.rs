//! Many devices at once on a gateway with a low limit.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::harness::{
    devices::{devices, persist_all},
    gateway::Gateway,
};

const DEVICES: u32 = 300;
/// Keys per second, and keys in flight.
const CEILING: u32 = 400;
const LIMIT: u32 = 4;

#[tokio::test(flavor = "multi_thread")]
async fn storm_is_let_in_at_the_rate_that_the_database_takes() {
    let settings = format!("[admission]\nlookups_per_second_max = {CEILING}\nkeys_in_flight_max = {LIMIT}\n");
    let gateway = Gateway::start(&settings).await;
    gateway.register(0..DEVICES).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let watch = watch(&gateway, &is_over);

    let begun = Instant::now();
    let arrived = persist_all(gateway.devices, devices(0..DEVICES)).await;
    let took = begun.elapsed().as_secs_f64();
    is_over.store(true, Ordering::Relaxed);

    let (in_flight_max, looks) = watch.await.unwrap();
    assert!(
        (1..=LIMIT).contains(&in_flight_max) && looks > 100,
        "{in_flight_max} in {looks} looks"
    );
    let refusals: u32 = arrived.iter().map(|device| device.refusals).sum();
    let least = f64::from(DEVICES) / f64::from(CEILING);
    assert!(took >= 0.8 * least, "faster than the ceiling: {took} s");
    // The first slot is half a second ahead, and a device waits up to a second for its connection here.
    assert!(took <= 1.3 * least + 1.5, "{took} s for what {least} s are enough for");
    assert!(refusals <= 2 * DEVICES, "{refusals} refusals");
    assert_eq!(gateway.metric("seawall_sessions "), u64::from(DEVICES));
    assert_eq!(
        gateway.metric("seawall_lookups_total{outcome=\"found\"}"),
        u64::from(DEVICES),
        "nobody is looked up twice"
    );
}

/// Maximum number of keys in flight that was seen, and the number of samples.
fn watch(gateway: &Gateway, is_over: &Arc<AtomicBool>) -> tokio::task::JoinHandle<(u32, u32)> {
    let (shared, is_over) = (Arc::clone(&gateway.shared), Arc::clone(is_over));
    tokio::spawn(async move {
        let (mut most, mut looks) = (0, 0);
        while !is_over.load(Ordering::Relaxed) {
            let state = shared.lookups.state();
            assert!(state.in_flight <= state.limit, "{state:?}");
            most = most.max(state.in_flight);
            looks += 1;
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        (most, looks)
    })
}
