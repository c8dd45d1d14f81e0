//! Firmware versions that the fleet has run.

use seawall_gateway::store::{StoredVersion, VersionName};
use seawall_proto::{
    id::Label,
    proving::VersionState::{self, Proven, Unproven, Worse},
};

use super::{Fixture, audit, on_both};

on_both!(
    versions_of_a_young_fleet_are_recorded_as_devices_write_them,
    first_verdict_that_is_stored_holds,
    fleet_is_young_until_its_first_version_is_a_day_old,
    cleared_version_is_proven_and_recorded_once,
    old_trials_are_removed_and_a_full_table_takes_no_more,
);

const ONE: VersionName<'_> = (Some("cam"), Some("1"));
const TWO: VersionName<'_> = (Some("cam"), Some("2"));

async fn stored(fixture: &Fixture) -> Vec<(Option<String>, Option<String>, VersionState)> {
    let since = fixture.store.now().await.unwrap();
    let found = fixture.store.versions_changed(since).await.unwrap().versions;
    let text = |label: Option<Label>| label.map(|label| label.as_str().to_owned());
    let mut found: Vec<_> = found
        .into_iter()
        .map(|StoredVersion { model, firmware, state }| (text(model), text(firmware), state))
        .collect();
    found.sort_by(|left, right| (&left.0, &left.1).cmp(&(&right.0, &right.1)));
    found
}

fn row((model, firmware): VersionName<'_>, state: VersionState) -> (Option<String>, Option<String>, VersionState) {
    (model.map(str::to_owned), firmware.map(str::to_owned), state)
}

async fn versions_of_a_young_fleet_are_recorded_as_devices_write_them(fixture: &Fixture) {
    let store = &fixture.store;
    store.version_write(TWO, None, Unproven).await.unwrap();
    let odd = (Some("cam \"x\""), Some("1.0'\\u0041"));

    let loaded = store.versions_load(&[ONE, TWO, odd, (None, None)]).await;

    assert_eq!(loaded.unwrap().versions.len(), 4);
    let expected = [
        row((None, None), Proven),
        row(ONE, Proven),
        row(TWO, Unproven),
        row(odd, Proven),
    ];
    assert_eq!(stored(fixture).await, expected);
}

async fn first_verdict_that_is_stored_holds(fixture: &Fixture) {
    let store = &fixture.store;
    assert_eq!(store.version_write(TWO, None, Unproven).await.unwrap(), Unproven);
    // Two nodes see it first, and find different things.
    assert_eq!(store.version_write(TWO, None, Unproven).await.unwrap(), Unproven);
    assert_eq!(store.version_write(TWO, Some(Unproven), Worse).await.unwrap(), Worse);
    assert_eq!(store.version_write(TWO, Some(Unproven), Proven).await.unwrap(), Worse);
    assert_eq!(store.version_write(TWO, None, Unproven).await.unwrap(), Worse);

    assert_eq!(store.version_write(TWO, Some(Worse), Proven).await.unwrap(), Proven);
    assert_eq!(stored(fixture).await, [row(TWO, Proven)]);
}

async fn fleet_is_young_until_its_first_version_is_a_day_old(fixture: &Fixture) {
    let store = &fixture.store;
    assert!(store.versions_load(&[]).await.unwrap().is_young);
    assert!(store.versions_load(&[ONE]).await.unwrap().is_young);

    fixture
        .db_run("UPDATE firmware_versions SET first_seen_at = first_seen_at - 86400000")
        .await;

    assert!(!store.versions_load(&[TWO]).await.unwrap().is_young);
}

async fn cleared_version_is_proven_and_recorded_once(fixture: &Fixture) {
    let store = &fixture.store;
    store.version_write(TWO, None, Worse).await.unwrap();
    let clear = |name| async move {
        store
            .version_clear(name, "cam/2", &audit("firmware.clear", 1))
            .await
            .unwrap()
    };

    assert_eq!(clear(ONE).await, None);
    assert_eq!(clear(TWO).await, Some(Worse));
    assert_eq!(clear(TWO).await, None);

    assert_eq!(stored(fixture).await, [row(TWO, Proven)]);
}

async fn old_trials_are_removed_and_a_full_table_takes_no_more(fixture: &Fixture) {
    let store = &fixture.store;
    store.version_write(ONE, None, Proven).await.unwrap();
    store.version_write(TWO, None, Unproven).await.unwrap();
    fixture
        .db_run("UPDATE firmware_versions SET changed_at = changed_at - 2678400000")
        .await;
    store.versions_load(&[]).await.unwrap();
    assert_eq!(
        store.version_write(TWO, Some(Unproven), Worse).await.unwrap(),
        Worse,
        "it is new again"
    );

    let names: Vec<String> = (0..20_000).map(|number| format!("9.{number}")).collect();
    let many: Vec<VersionName<'_>> = names.iter().map(|name| (None, Some(name.as_str()))).collect();
    store.versions_load(&many).await.unwrap();
    store.version_write((None, Some("10")), None, Unproven).await.unwrap();

    let after = store.versions_load(&[(None, Some("11"))]).await.unwrap().versions;
    let has = |firmware: &str| {
        after
            .iter()
            .any(|version| version.firmware.as_deref() == Some(firmware))
    };
    assert!(!has("10") && !has("11"));
    assert!(store.version_write(TWO, Some(Worse), Proven).await.unwrap() == Proven);
}
