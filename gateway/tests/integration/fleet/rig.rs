//! A whole gateway in this process, and devices with known secrets.

use std::{
    net::SocketAddr,
    ops::Range,
    time::{Duration, Instant},
};

use firmware_sim::connection::{Connection, DeviceConfig, OpenError, Received, Refused};
use seawall_gateway::{
    config::{Config, DatabaseUrl},
    serve::{self, Running},
    state::Shared,
    store::{Audit, NewDevice, Store},
};
use seawall_proto::{
    id::{DeviceId, Label, RuleId, SecretHash},
    rules::{Effect, Match, RuleSpec},
    time::WallTime,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

/// How long a condition may take to come true.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// Longest time in which any device is answered. Contract section 3.
pub const ANSWER_MAX: Duration = Duration::from_secs(3);
/// The same while the database is known to be away.
pub const ANSWER_MAX_AWAY: Duration = Duration::from_millis(500);
/// Time between two looks at a condition.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A running gateway. Its tasks end with the test's runtime.
pub struct Gateway {
    pub shared: Shared,
    pub devices: SocketAddr,
    running: Running,
    home: TempDir,
}

impl Gateway {
    /// On an SQLite of its own, with these settings (TOML) over the defaults.
    pub async fn start(settings: &str) -> Self {
        Self::start_on(None, settings).await
    }

    /// On a database that others use too.
    pub async fn start_on(database: Option<&DatabaseUrl>, settings: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), database, settings).await
    }

    /// Ends it and starts it again, on the same data directory.
    pub async fn restart_on(self, database: Option<&DatabaseUrl>) -> Self {
        self.running.stop().await.unwrap();
        Self::start_in(self.home, database, "").await
    }

    /// In `data` of a directory that may hold files already.
    pub async fn start_in(home: TempDir, database: Option<&DatabaseUrl>, settings: &str) -> Self {
        let mut config = Config::from_toml(settings).unwrap();
        config.server.data_dir = home.path().join("data");
        if config.server.listen == Config::default().server.listen {
            config.server.listen.set_port(0);
        }
        config.ops.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.database.url = database.cloned();
        config.validate().unwrap();
        let running = serve::start(config).await.unwrap();
        Self {
            shared: running.state.clone(),
            devices: running.addresses.devices,
            running,
            home,
        }
    }

    /// Registers the devices of these numbers.
    pub async fn register(&self, numbers: Range<u32>) {
        register(&self.shared.store, numbers).await;
    }

    /// Registers one device.
    pub async fn register_as(&self, device: &NewDevice) {
        let audit = audit("device.create");
        self.shared.store.device_insert(device, &audit).await.unwrap();
    }

    /// Makes a rule as the API does: stored, and in force here when this returns.
    pub async fn add_rule(&self, spec: RuleSpec) -> RuleId {
        let id = add_rule(&self.shared.store, spec).await;
        self.reload_rules().await;
        id
    }

    pub async fn delete_rule(&self, id: RuleId) {
        let revision = self.shared.store.rule_delete(id, &audit("rule.delete")).await;
        assert!(revision.unwrap().is_some());
        self.reload_rules().await;
    }

    async fn reload_rules(&self) {
        let state = &self.shared;
        state
            .rules
            .reload(&state.store, &state.clock, &state.events)
            .await
            .unwrap();
    }

    /// One attempt to connect.
    pub async fn connect(&self, device: &DeviceConfig) -> Attempt {
        attempt(self.devices, device.clone()).await
    }

    /// A session that must come about, its welcome read.
    pub async fn session(&self, device: &DeviceConfig) -> Connection {
        let mut connection = self.connect(device).await.admitted();
        if device.protocols.is_some() {
            assert_eq!(connection.next_json(PATIENCE).await.unwrap()["type"], "welcome");
        }
        connection
    }

    /// All at once; the answers in the order of the devices.
    pub async fn connect_all(&self, devices: &[DeviceConfig]) -> Vec<Attempt> {
        let mut tasks = JoinSet::new();
        for (index, device) in devices.iter().cloned().enumerate() {
            let address = self.devices;
            tasks.spawn(async move { (index, attempt(address, device).await) });
        }
        let mut attempts = tasks.join_all().await;
        attempts.sort_by_key(|(index, _)| *index);
        attempts.into_iter().map(|(_, attempt)| attempt).collect()
    }

    /// As [`Self::connect_all`], where all must get in.
    pub async fn sessions(&self, devices: &[DeviceConfig]) -> Vec<Connection> {
        let attempts = self.connect_all(devices).await;
        attempts.into_iter().map(Attempt::admitted).collect()
    }

    /// The sum of all series whose text begins like this.
    pub fn metric(&self, beginning: &str) -> u64 {
        let text = self.shared.metrics.render();
        let figures = text
            .lines()
            .filter(|line| line.starts_with(beginning))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
        figures.sum::<f64>().round() as u64
    }

    /// Status of `GET /readyz` on the device listener.
    pub async fn readyz(&self) -> u16 {
        raw(self.devices, b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await
    }
}

/// What became of an attempt, and how long the device waited for it.
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

    /// Refused with this code.
    #[track_caller]
    pub fn refused_with(&self, status: u16, code: &str) -> &Refused {
        let refused = self.refused();
        assert_eq!((refused.status, refused.code.as_deref()), (status, Some(code)));
        refused
    }
}

/// One attempt, timed from before the TCP connection.
pub async fn attempt(address: SocketAddr, device: DeviceConfig) -> Attempt {
    let begun = Instant::now();
    let outcome = Connection::open(&format!("ws://{address}"), &device).await;
    Attempt {
        outcome,
        took: begun.elapsed(),
    }
}

/// Comes back as each refusal says, until it is let in. The refusals on the way must carry a slot.
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
        assert!(Instant::now() + wait < deadline, "sent away for {wait:?}");
        tokio::time::sleep(wait).await;
    }
}

/// A device that got in.
pub struct Persisted {
    pub connection: Connection,
    /// How often it was refused before.
    pub refusals: u32,
}

/// All at once, each until it is let in.
pub async fn persist_all(address: SocketAddr, devices: impl IntoIterator<Item = DeviceConfig>) -> Vec<Persisted> {
    let mut tasks = JoinSet::new();
    for device in devices {
        tasks.spawn(persist(address, device));
    }
    tasks.join_all().await
}

/// The session is alive: what the device sends is taken and acknowledged.
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

/// How a session ends: the text frames before (welcome aside), the code, and the reason as JSON where it is.
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

/// Sends bytes, reads to the end; the status of the answer, 0 where there was none.
pub async fn raw(address: SocketAddr, request: &[u8]) -> u16 {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // A reset after the answer is as good as its end.
        let _ = stream.read_to_end(&mut answer).await;
        let text = String::from_utf8_lossy(&answer).into_owned();
        text.split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or(0)
    };
    timeout(PATIENCE, exchange).await.expect("an answer in time")
}

/// Waits until `holds`.
#[track_caller]
pub fn eventually(mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let deadline = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < deadline, "never came true: {caller}");
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

pub fn id(number: u32) -> DeviceId {
    // The bytes spread over the buckets and shards as those of a random id would.
    DeviceId::from_uuid(uuid::Uuid::from_u128(
        u128::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835),
    ))
}

fn secret(number: u32) -> String {
    format!("the secret of device {number:06}").replace(' ', "-")
}

/// The device of this number, with its right secret.
pub fn device(number: u32) -> DeviceConfig {
    DeviceConfig::new(id(number), &secret(number)).firmware("1.0.0")
}

pub fn devices(numbers: Range<u32>) -> Vec<DeviceConfig> {
    numbers.map(device).collect()
}

/// The same device with a secret of nobody's.
pub fn with_wrong_secret(device: &DeviceConfig) -> DeviceConfig {
    DeviceConfig::new(device.id, "not-the-secret-of-anybody").firmware("1.0.0")
}

/// One that speaks no `seawall.v1`.
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

/// Stores a rule; no gateway is told.
pub async fn add_rule(store: &Store, spec: RuleSpec) -> RuleId {
    spec.validate().unwrap();
    let id = RuleId(uuid::Uuid::new_v4());
    store
        .rule_insert(id, spec, seawall_gateway::store::Consent::Given, &audit("rule.create"))
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
        at: WallTime::from_unix_ms(1),
        actor: "test".to_owned(),
        action,
    }
}
