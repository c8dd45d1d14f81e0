//! SQLite files that cannot be used: each has its own error, which says what to do.

use std::{fs, os::unix::fs::PermissionsExt as _};

use seawall_gateway::{
    runtime::config::DatabaseUrl,
    store::{Store, StoreError},
};
use sqlx::{Connection, SqliteConnection};

use super::{audit, new_device};

async fn open_error(path: &std::path::Path) -> StoreError {
    let url = DatabaseUrl::sqlite(path);
    let error = Store::open(&url).await.unwrap_err();
    assert!(
        error.to_string().contains(&path.display().to_string()),
        "{error} does not name the file"
    );
    let StoreError::Open { error: cause, .. } = error else {
        panic!("{error}");
    };
    *cause
}

#[tokio::test]
async fn file_that_is_no_database_is_named_so_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("notes.txt");
    fs::write(&path, "these are not rows\n".repeat(500)).unwrap();

    assert!(matches!(open_error(&path).await, StoreError::NotADatabase(_)));

    assert!(fs::read_to_string(&path).unwrap().starts_with("these are not rows"));
}

#[tokio::test]
async fn folder_and_missing_folder_are_unreadable() {
    let directory = tempfile::tempdir().unwrap();

    assert!(matches!(open_error(directory.path()).await, StoreError::Unreadable(_)));
    assert!(matches!(
        open_error(&directory.path().join("missing/seawall.db")).await,
        StoreError::Unreadable(_)
    ));
}

#[tokio::test]
async fn database_locked_by_another_process_is_told_and_retryable() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("seawall.db");
    let mut other = SqliteConnection::connect(&format!("sqlite:{}?mode=rwc", path.display()))
        .await
        .unwrap();
    sqlx::raw_sql("CREATE TABLE t (x); BEGIN EXCLUSIVE")
        .execute(&mut other)
        .await
        .unwrap();

    let error = open_error(&path).await;

    assert!(matches!(error, StoreError::Locked(_)), "{error}");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn write_behind_a_lock_ends_within_its_time_and_succeeds_afterwards() {
    let fixture = super::Fixture::sqlite().await;
    let path = fixture.url.sqlite_path().unwrap();
    let mut other = SqliteConnection::connect(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();

    let started = std::time::Instant::now();
    let locked = fixture
        .store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await;

    assert!(matches!(locked, Err(StoreError::Locked(_))), "{locked:?}");
    assert!(started.elapsed() < std::time::Duration::from_secs(2));
    assert_eq!(fixture.store.device(new_device(1).id).await.unwrap(), None);
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.unwrap();
    fixture
        .store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();
}

#[tokio::test]
async fn only_the_owner_may_read_the_file_and_its_companions() {
    let fixture = super::Fixture::sqlite().await;
    let path = fixture.url.sqlite_path().unwrap();
    fixture
        .store
        .device_insert(&new_device(1), &audit("device.create", 1))
        .await
        .unwrap();

    for entry in fs::read_dir(path.parent().unwrap()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(
            entry.metadata().unwrap().permissions().mode() & 0o777,
            0o600,
            "{:?}",
            entry.path()
        );
    }
}

#[tokio::test]
async fn write_ahead_log_is_on() {
    let fixture = super::Fixture::sqlite().await;
    let path = fixture.url.sqlite_path().unwrap();
    let mut other = SqliteConnection::connect(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();

    let mode: String = sqlx::Row::get(
        &sqlx::query("PRAGMA journal_mode").fetch_one(&mut other).await.unwrap(),
        0,
    );

    assert_eq!(mode, "wal");
}

#[tokio::test]
async fn full_disk_is_told_apart() {
    let fixture = super::Fixture::sqlite().await;
    let path = fixture.url.sqlite_path().unwrap();
    let mut other = SqliteConnection::connect(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();
    // SQLite reports its own maximum of pages as a full disk.
    sqlx::raw_sql("PRAGMA max_page_count = 1")
        .execute(&mut other)
        .await
        .unwrap();

    let full = sqlx::raw_sql(
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 9999) \
         INSERT INTO meta (key, value) SELECT n, 'x' FROM n",
    );
    let error = StoreError::from(full.execute(&mut other).await.unwrap_err());

    assert!(matches!(error, StoreError::DiskFull(_)), "{error}");
    assert!(error.is_retryable() && error.to_string().contains("free space"));
}

#[tokio::test]
async fn rules_are_read_while_a_device_write_waits_for_a_lock() {
    let fixture = super::Fixture::sqlite().await;
    let path = fixture.url.sqlite_path().unwrap();
    let mut other = SqliteConnection::connect(&format!("sqlite:{}", path.display()))
        .await
        .unwrap();
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    let store = fixture.store.clone();
    let waiting = tokio::spawn(async move { store.device_insert(&new_device(1), &audit("device.create", 1)).await });
    tokio::task::yield_now().await;

    let started = std::time::Instant::now();
    assert_eq!(fixture.store.rules_revision().await.unwrap(), 0);

    assert!(started.elapsed() < std::time::Duration::from_millis(500));
    assert!(waiting.await.unwrap().is_err());
}
