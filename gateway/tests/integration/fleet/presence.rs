//! Evidence that a device is offline, and its absence.

use seawall_proto::{close::Close, presence::Evidence};
use tokio_tungstenite::tungstenite::Message;

use crate::harness::{
    devices::{device, id},
    gateway::Gateway,
    wait::eventually,
};

#[tokio::test(flavor = "multi_thread")]
async fn every_end_of_a_session_has_its_evidence() {
    let gateway = Gateway::start("").await;
    gateway.register(0..4).await;
    let mut leaving = gateway.session(&device(0)).await;
    let reset = gateway.session(&device(1)).await;
    let mut ordered = gateway.session(&device(2)).await;
    let mut binary = gateway.session(&device(3)).await;

    leaving.close(1001, "").await.unwrap();
    reset.abort();
    let order = Close::disconnected(&mut rand::rng());
    gateway.shared.sessions.get(id(2)).unwrap().close(order);
    binary.send(Message::binary(b"x".to_vec())).await.unwrap();
    eventually(|| gateway.shared.sessions.is_empty()).await;

    let evidence = |number| {
        let record = gateway.shared.history.record(id(number)).unwrap();
        record.offline.map(|offline| offline.evidence)
    };
    let closed = |code, by_device| Some(Evidence::Closed { code, by_device });
    assert_eq!(evidence(0), closed(1001, true));
    assert_eq!(evidence(1), Some(Evidence::Reset));
    assert_eq!(evidence(2), closed(4003, false));
    assert_eq!(evidence(3), closed(1003, false));
    drop((ordered.next_frame().await, binary.next_frame().await));
}
