//! The connect path's read.

use std::time::Duration;

use seawall_gateway::store::{Answer, DeviceChange, KEYS_MAX, StoreError};
use seawall_proto::record::DeviceState;

use super::{Fixture, audit, device, new_device, on_both};

const LIMIT: Duration = Duration::from_secs(1);

on_both!(
    registered_keys_are_found_and_others_are_missing,
    one_look_up_takes_up_to_256_keys,
    record_shows_what_the_registry_holds_now,
    no_keys_ask_nothing,
    cancelled_look_up_does_not_harm_the_next,
);

async fn registered_keys_are_found_and_others_are_missing(fixture: &Fixture) {
    for number in [1, 2, u128::MAX] {
        fixture
            .store
            .device_insert(&new_device(number), &audit("device.create", 1))
            .await
            .unwrap();
    }
    let mut worker = fixture.store.lookup_worker();

    let mut found = worker
        .find(&[1, 9, u128::MAX, 0].map(device), LIMIT)
        .await
        .unwrap()
        .records;

    found.sort_by_key(|record| record.id);
    assert_eq!(
        found.iter().map(|record| record.id).collect::<Vec<_>>(),
        [1, u128::MAX].map(device)
    );
    assert_eq!(found[0].secret, new_device(1).secret);
    assert_eq!(worker.find(&[device(8)], LIMIT).await.unwrap(), Answer::default());
}

async fn one_look_up_takes_up_to_256_keys(fixture: &Fixture) {
    fixture.db_fill(1_000).await;
    let mut worker = fixture.store.lookup_worker();
    let keys: Vec<_> = (1..=257).map(|number| device(number * 3)).collect();

    for count in [1, 64, 256] {
        assert_eq!(worker.find(&keys[..count], LIMIT).await.unwrap().records.len(), count);
    }
    assert_eq!(KEYS_MAX, 256);
    assert!(matches!(worker.find(&keys, LIMIT).await, Err(StoreError::Invalid(_))));
}

async fn record_shows_what_the_registry_holds_now(fixture: &Fixture) {
    let mut worker = fixture.store.lookup_worker();
    assert_eq!(worker.find(&[device(1)], LIMIT).await.unwrap(), Answer::default());
    fixture
        .store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
    assert_eq!(
        worker.find(&[device(1)], LIMIT).await.unwrap().records[0].state,
        DeviceState::Enabled
    );
    let change = DeviceChange {
        state: Some(DeviceState::Disabled),
        ..DeviceChange::default()
    };

    let changed = fixture
        .store
        .device_update(device(1), &change, &audit("device.disable", 2))
        .await
        .unwrap()
        .unwrap();

    assert_eq!(
        worker.find(&[device(1)], LIMIT).await.unwrap().records,
        [changed.record]
    );
}

async fn no_keys_ask_nothing(fixture: &Fixture) {
    fixture.db_run("ALTER TABLE devices RENAME TO elsewhere").await;

    assert_eq!(
        fixture.store.lookup_worker().find(&[], LIMIT).await.unwrap(),
        Answer::default()
    );
}

async fn cancelled_look_up_does_not_harm_the_next(fixture: &Fixture) {
    fixture.db_fill(10).await;
    let mut worker = fixture.store.lookup_worker();

    for micros in [1, 10, 100, 500, 1_000, 2_000, 5_000] {
        let keys = [device(1)];
        let cut_short = worker.find(&keys, LIMIT);
        let _ = tokio::time::timeout(Duration::from_micros(micros), cut_short).await;
        assert_eq!(worker.find(&[device(2)], LIMIT).await.unwrap().records[0].id, device(2));
    }
}
