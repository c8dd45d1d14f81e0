//! Sessions of devices that were disabled, revoked or deleted, or whose credential was replaced, through any node. They
//! end when the change is seen.

use std::{sync::Arc, time::Duration};

use seawall_proto::{
    close::Close,
    id::DeviceId,
    record::{DeviceRecord, DeviceState},
};

use crate::{
    node::{Shared, State},
    runtime::lifecycle::blocking,
    store::{PAGE_MAX, StoreError},
};

/// Pause before a device is checked again whose row cannot be read, or whose absence cannot be believed.
const UNCLEAR_PAUSE: Duration = Duration::from_secs(30);

/// Checks the changed devices that have or had a session here. Ends the sessions that are no longer valid, and forgets
/// deleted devices.
///
/// # Errors
/// The registry cannot be read: they are checked again.
pub async fn end_revoked_sessions(state: &Shared) -> Result<(), StoreError> {
    recheck_sessions(state).await?;
    loop {
        let now = state.clock.now();
        let due = state
            .resume
            .take_changed(now, PAGE_MAX as usize, |device| is_seen(state, device));
        if due.is_empty() {
            return Ok(());
        }
        let records = match state.store.device_records(&due).await {
            Ok(records) => records,
            Err(error) => {
                state.resume.note_changed(due, now);
                return Err(error);
            }
        };
        let mut unclear = Vec::new();
        for device in due {
            match records.iter().find(|(known, _)| *known == device) {
                Some((_, Some(record))) => end_revoked_session(state, device, record),
                // Its change was recorded, and it is missing: it was deleted.
                None if state.lookups.believes_absence() => handle_deleted(state, device),
                Some((_, None)) | None => unclear.push(device),
            }
        }
        state.resume.note_changed(unclear, now + UNCLEAR_PAUSE);
    }
}

/// Checks the next sessions in a check of all. It reads one page at a time: polls of revocations continue in between,
/// and devices whose sessions end return at a pace.
///
/// A device that the registry lacks keeps its session: no change of it was recorded.
async fn recheck_sessions(state: &Shared) -> Result<(), StoreError> {
    if state.resume.begin_recheck(state.clock.now()) {
        let reading = Arc::clone(state);
        let devices = blocking(move || {
            let mut devices = Vec::with_capacity(reading.sessions.len());
            reading.sessions.for_each(|session| devices.push(session.info.device));
            devices
        });
        state.resume.recheck().rest = devices.await.unwrap_or_default();
    }
    let page = state.resume.next_to_recheck(PAGE_MAX as usize);
    if page.is_empty() {
        return Ok(());
    }
    let records = match state.store.device_records(&page).await {
        Ok(records) => records,
        Err(error) => {
            state.resume.recheck().rest.extend(page);
            return Err(error);
        }
    };
    let mut unclear = Vec::new();
    for (device, record) in &records {
        match record {
            Some(record) => end_revoked_session(state, *device, record),
            // Its row cannot be read.
            None => unclear.push(*device),
        }
    }
    state.resume.note_changed(unclear, state.clock.now() + UNCLEAR_PAUSE);
    Ok(())
}

/// Whether the device has a session here, or had one since the start.
fn is_seen(state: &State, device: DeviceId) -> bool {
    state.sessions.get(device).is_some() || state.history.record(device).is_some()
}

/// Ends the session of a device that may not connect, or not with the credential that it has shown: the client may have
/// stolen that. `record` comes from the registry. From now on the device is counted by its tenant and model.
pub fn end_revoked_session(state: &State, device: DeviceId, record: &DeviceRecord) {
    let tenant = state.cohorts.tenant(&record.tenant);
    state
        .history
        .handle_registered(device, &tenant, record.model.as_deref());
    let Some(session) = state.sessions.get(device) else {
        return;
    };
    let mut rng = rand::rng();
    let order = match record.state {
        DeviceState::Enabled if record.still_accepts(session.info.credential, state.clock.wall()) => return,
        DeviceState::Enabled => Close::disconnected(&mut rng),
        DeviceState::Disabled => Close::disabled(&mut rng),
        DeviceState::Revoked => Close::Revoked,
    };
    session.close(order);
}

/// A device was deleted, through this node or another: its session ends, and nothing of it is remembered.
pub fn handle_deleted(state: &State, device: DeviceId) {
    if let Some(session) = state.sessions.get(device) {
        // Its end would be remembered, otherwise.
        session.mark_deleted();
        session.close(Close::Revoked);
    }
    state.history.forget(device);
}
