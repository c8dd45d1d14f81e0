//! Sessions of devices that were disabled, revoked or deleted, or whose credential was replaced, through whichever node: they end when the change
//! is seen.

use std::time::Duration;

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{
    close::Close,
    id::DeviceId,
    record::{DeviceRecord, DeviceState},
};

use crate::{
    state::State,
    store::{PAGE_MAX, StoreError},
};

/// A handshake that had read the registry before a change is over by then (contract section 3): what became a session meanwhile is
/// looked at again.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(4);

/// Pause before another look at a device whose row can't be read, or whose absence can't be believed.
const UNCLEAR_PAUSE: Duration = Duration::from_secs(30);

/// Looks at the changed devices that have a session here, and ends those that the registry does not want any more.
///
/// # Errors
/// The registry can't be read: they are looked at again.
pub async fn end_unwanted_sessions(state: &State) -> Result<(), StoreError> {
    loop {
        let now = state.clock.now();
        let due = state
            .resume
            .take_changed(now, PAGE_MAX as usize, |device| state.sessions.get(device).is_some());
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
                Some((_, Some(record))) => end_unwanted_session(state, device, Some(record)),
                // Its change was recorded, and it is gone: it was deleted.
                None if state.gate.believes_absence() => end_unwanted_session(state, device, None),
                Some((_, None)) | None => unclear.push(device),
            }
        }
        state.resume.note_changed(unclear, now + UNCLEAR_PAUSE);
    }
}

/// Ends the session of a device that may not connect, or not with the credential that it has shown: whoever is connected may have it from a thief.
///
/// `record` as the registry has it; `None`: the device is not in it.
pub fn end_unwanted_session(state: &State, device: DeviceId, record: Option<&DeviceRecord>) {
    let Some(session) = state.sessions.get(device) else {
        return;
    };
    let mut rng = SmallRng::from_os_rng();
    let order = match record.map(|record| (record.state, record)) {
        Some((DeviceState::Enabled, record)) if record.still_accepts(session.info.credential, state.clock.wall()) => {
            return;
        }
        Some((DeviceState::Enabled, _)) => Close::disconnected(&mut rng),
        Some((DeviceState::Disabled, _)) => Close::disabled(&mut rng),
        Some((DeviceState::Revoked, _)) | None => Close::Revoked,
    };
    session.close(order);
}
