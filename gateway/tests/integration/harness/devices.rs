//! Devices with known secrets, single or as a fleet, and rules about them.

use std::{
    net::SocketAddr,
    ops::Range,
    time::{Duration, Instant},
};

use firmware_sim::connection::{Connection, DeviceConfig, OpenError, Received, Refused};
use seawall_gateway::store::{Audit, Consent, NewDevice, Store};
use seawall_proto::{
    id::{DeviceId, Label, RuleId, SecretHash},
    rules::{Effect, Match, RuleSpec},
    time::WallTime,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use super::wait::PATIENCE;

/// Maximum time until a device is answered. docs/PROTOCOL.md, "Being refused".
pub const ANSWER_MAX: Duration = Duration::from_secs(3);
/// The same while the database is known to be away.
pub const ANSWER_MAX_AWAY: Duration = Duration::from_millis(500);

/// Result of an attempt, and the time that the device waited for it.
pub struct Attempt {
    pub outcome: Result<Connection, OpenError>,
    pub took: Duration,
}

impl Attempt {
    #[track_caller]
    pub fn admitted(self) -> Connection {
        match self.outcome {
            Ok(connection) => connection,
            Err(error) => panic!("not admitted after {:?}: {error:?}", self.took),
        }
    }

    #[track_caller]
    pub fn refused(&self) -> &Refused {
        match &self.outcome {
            Ok(_) => panic!("admitted, not refused"),
            Err(error) => match error.refused() {
                Some(refused) => refused,
                None => panic!("not answered after {:?}: {error:?}", self.took),
            },
        }
    }

    /// Asserts a refusal with this code.
    #[track_caller]
    pub fn refused_with(&self, status: u16, code: &str) -> &Refused {
        let refused = self.refused();
        assert_eq!((refused.status, refused.code.as_deref()), (status, Some(code)));
        refused
    }
}

/// Makes one attempt, timed from before the TCP connection.
pub async fn attempt(address: SocketAddr, device: DeviceConfig) -> Attempt {
    let begun = Instant::now();
    let outcome = Connection::open(&format!("ws://{address}"), &device).await;
    Attempt {
        outcome,
        took: begun.elapsed(),
    }
}

/// Retries as each refusal says, until it is admitted. Each refusal must have a slot.
pub async fn persist(address: SocketAddr, mut device: DeviceConfig) -> Persisted {
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut refusals = 0;
    loop {
        let attempt = attempt(address, device.clone()).await;
        assert!(attempt.took < ANSWER_MAX, "answered after {:?}", attempt.took);
        if attempt.outcome.is_ok() {
            return Persisted {
                connection: attempt.admitted(),
                refusals,
            };
        }
        let refused = attempt.refused();
        assert_eq!(refused.status, 503, "{refused:?}");
        refusals += 1;
        device.slot = Some(refused.slot.clone().expect("a slot"));
        let wait = Duration::from_millis(refused.retry_after_ms.expect("a hint"));
        assert!(Instant::now() + wait < deadline, "refused for {wait:?}");
        tokio::time::sleep(wait).await;
    }
}

/// An admitted device.
pub struct Persisted {
    pub connection: Connection,
    /// Number of refusals before.
    pub refusals: u32,
}

/// All at once, each until it is admitted.
pub async fn persist_all(address: SocketAddr, devices: impl IntoIterator<Item = DeviceConfig>) -> Vec<Persisted> {
    let mut tasks = JoinSet::new();
    for device in devices {
        tasks.spawn(persist(address, device));
    }
    tasks.join_all().await
}

/// Asserts that the session is alive: a message of the device is accepted and acknowledged.
pub async fn assert_alive(connection: &mut Connection) {
    let message = json!({"type": "message", "id": "alive?", "topic": "test", "payload": 1});
    connection.send_json(&message).await.unwrap();
    let ack = loop {
        let frame = connection.next_json(PATIENCE).await.unwrap();
        if frame["type"] != "welcome" {
            break frame;
        }
    };
    assert_eq!(ack, json!({"type": "ack", "id": "alive?"}));
}

/// End of a session: the text frames before it (without the welcome), the code, and the reason as JSON if it is JSON.
pub async fn end_of(connection: &mut Connection, within: Duration) -> (Vec<Value>, u16, Value) {
    let end = async {
        let mut frames = Vec::new();
        loop {
            match connection.next_frame().await {
                Received::Text(text) => {
                    let frame: Value = serde_json::from_str(&text).unwrap();
                    if frame["type"] != "welcome" {
                        frames.push(frame);
                    }
                }
                Received::Closed { code, reason } => {
                    return (
                        frames,
                        code,
                        serde_json::from_str(&reason).unwrap_or(Value::String(reason)),
                    );
                }
                Received::Ping(_) | Received::Pong(_) => {}
                other @ (Received::Binary(_) | Received::Lost) => panic!("{other:?}"),
            }
        }
    };
    timeout(within, end).await.expect("the session ends in time")
}

/// Sends bytes and reads to the end. Returns the status of the answer, or 0 without one.
pub async fn raw(address: SocketAddr, request: &[u8]) -> u16 {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // A reset after the answer also ends it.
        let _ = stream.read_to_end(&mut answer).await;
        let text = String::from_utf8_lossy(&answer).into_owned();
        text.split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or(0)
    };
    timeout(PATIENCE, exchange).await.expect("an answer in time")
}

pub fn id(number: u32) -> DeviceId {
    // Spreads the bytes over buckets and shards like those of a random id.
    DeviceId::from_uuid(uuid::Uuid::from_u128(
        u128::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835),
    ))
}

pub fn secret(number: u32) -> String {
    format!("the secret of device {number:06}").replace(' ', "-")
}

/// The device with this number and its right secret.
pub fn device(number: u32) -> DeviceConfig {
    DeviceConfig::new(id(number), &secret(number)).firmware("1.0.0")
}

pub fn devices(numbers: Range<u32>) -> Vec<DeviceConfig> {
    numbers.map(device).collect()
}

/// The same device with a wrong secret.
pub fn with_wrong_secret(device: &DeviceConfig) -> DeviceConfig {
    DeviceConfig::new(device.id, "not-the-secret-of-anybody").firmware("1.0.0")
}

/// A device with a plain session.
pub fn plain(mut device: DeviceConfig) -> DeviceConfig {
    device.protocols = None;
    device
}

pub fn new_device(number: u32) -> NewDevice {
    NewDevice {
        external_id: None,
        id: id(number),
        tenant: None,
        model: None,
        secret: SecretHash::of(secret(number).as_bytes()),
    }
}

pub async fn register(store: &Store, numbers: Range<u32>) {
    for number in numbers {
        store
            .device_insert(&new_device(number), &audit("device.create"))
            .await
            .unwrap();
    }
}

/// Stores a rule without notifying a gateway.
pub async fn add_rule(store: &Store, spec: RuleSpec) -> RuleId {
    spec.validate().unwrap();
    let id = RuleId(uuid::Uuid::new_v4());
    store
        .rule_insert(id, spec, Consent::Given, &audit("rule.create"))
        .await
        .unwrap();
    id
}

/// A rule that blocks these versions.
pub fn block(firmware: &str) -> RuleSpec {
    block_matching(Match {
        firmware: Some(firmware.parse().unwrap()),
        ..Match::default()
    })
}

pub fn block_matching(matches: Match) -> RuleSpec {
    RuleSpec {
        reason: "it crashes".to_owned(),
        ..RuleSpec::new(matches, Effect::Block)
    }
}

pub fn label(text: &str) -> Label {
    Label::parse(text).unwrap().unwrap()
}

pub fn audit(action: &'static str) -> Audit {
    Audit {
        id: uuid::Uuid::now_v7(),
        at: WallTime::from_unix_ms(1),
        actor: "test".to_owned(),
        action,
    }
}
