//! The devices of a run: the reference device's machine on real sockets, one task each, told what to do by the phases.
//!
//! A device decides by itself when to come back; an [`Order`] is what happens to it from outside. Of several orders that it has not
//! seen yet the newest counts, so that nothing queues up.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use firmware_sim::{
    connection::{Connection, DeviceConfig, OpenError, Received},
    device::{Action, CloseFrame, Device as Machine, State},
    profile::Profile,
    target::{Sources, Target},
};
use rand::{SeedableRng, rngs::SmallRng};
use seawall_proto::{id::DeviceId, time::Instant};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    plan::Device,
    recorder::{Event, Recorder},
};

/// What a slow reader takes for a message.
const SLOW_READ: Duration = Duration::from_secs(1);

/// All devices of a run. They end with [`Fleet::stop`], and with this value.
#[derive(Debug)]
pub struct Fleet {
    orders: Vec<watch::Sender<Order>>,
    tasks: TaskTracker,
    ended: CancellationToken,
}

/// What happens to a device.
#[derive(Clone, Debug)]
enum Order {
    /// Nothing yet.
    Stay,
    /// It starts: its first attempt is now.
    Start,
    /// Its connection is reset under it.
    LoseConnection,
    /// It starts anew, with an attempt at once; as another version, where one is given.
    Restart { firmware: Option<String> },
}

/// What all devices share.
#[derive(Debug)]
struct Shared {
    url: String,
    recorder: Arc<Recorder>,
    origin: std::time::Instant,
    ended: CancellationToken,
}

impl Fleet {
    /// Makes a task for each device; they wait for [`Self::connect`].
    ///
    /// # Errors
    /// `url` is no `ws://HOST:PORT`, HOST has no address, or a profile has an unknown name.
    pub async fn start(devices: &[Device], url: &str, recorder: Arc<Recorder>, seed: u64) -> Result<Self> {
        let target = Target::resolve(url).await?;
        let sources = Sources::default();
        let ended = CancellationToken::new();
        let shared = Arc::new(Shared {
            url: url.to_owned(),
            recorder,
            origin: std::time::Instant::now(),
            ended: ended.clone(),
        });
        let tasks = TaskTracker::new();
        let mut orders = Vec::with_capacity(devices.len());
        for (index, device) in devices.iter().enumerate() {
            let (order, ordered) = watch::channel(Order::Stay);
            let profile = device.profile.parse().context("reading a device's profile")?;
            let mut config =
                DeviceConfig::new(DeviceId::from_uuid(device.id), &device.secret).firmware(&device.firmware);
            config.model.clone_from(&device.model);
            config.tenant.clone_from(&device.tenant);
            config.source = sources.of(index, &target);
            // The machine gives up first: its patience is the device's.
            config.open_timeout = 2 * device.connect_timeout;
            let task = Task {
                index,
                config,
                connect_timeout: device.connect_timeout,
                profile,
                shared: Arc::clone(&shared),
                rng: SmallRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64)),
                machine: Machine::new(profile, Instant::FAR_FUTURE),
                link: Link::None,
            };
            tasks.spawn(task.live(ordered));
            orders.push(order);
        }
        tasks.close();
        Ok(Self { orders, tasks, ended })
    }

    /// The device makes its first attempt.
    pub fn connect(&self, index: usize) {
        self.order(index, Order::Start);
    }

    /// The device's connection is reset; when it comes back is its own decision.
    pub fn drop_connection(&self, index: usize) {
        self.order(index, Order::LoseConnection);
    }

    /// The device loses its connection and what it kept in memory, and connects at once.
    pub fn restart(&self, index: usize) {
        self.order(index, Order::Restart { firmware: None });
    }

    /// The same, and runs another version from then on.
    pub fn upgrade(&self, index: usize, firmware: &str) {
        self.order(
            index,
            Order::Restart {
                firmware: Some(firmware.to_owned()),
            },
        );
    }

    /// Ends all devices; their connections are reset.
    pub async fn stop(self) {
        self.ended.cancel();
        self.tasks.wait().await;
    }

    fn order(&self, index: usize, order: Order) {
        if let Some(sender) = self.orders.get(index) {
            sender.send_modify(|waiting| *waiting = order.over(waiting));
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

impl Order {
    /// The newer order, that does not forget a version that the older one brought and that the device may not have seen.
    fn over(self, older: &Self) -> Self {
        match (self, older) {
            (Self::Restart { firmware: None }, Self::Restart { firmware }) => Self::Restart {
                firmware: firmware.clone(),
            },
            (newer, _) => newer,
        }
    }
}

/// One device.
struct Task {
    index: usize,
    config: DeviceConfig,
    connect_timeout: Duration,
    profile: Profile,
    shared: Arc<Shared>,
    rng: SmallRng,
    machine: Machine,
    link: Link,
}

enum Link {
    None,
    Dialing(Pin<Box<dyn Future<Output = Dialed> + Send>>),
    Open {
        connection: Box<Connection>,
        /// Until then a slow reader does not read.
        resting: Option<tokio::time::Instant>,
    },
}

type Dialed = Result<Box<Connection>, OpenError>;

/// What a link tells.
enum News {
    Dialed(Dialed),
    Received(Received),
    Rested,
}

impl Task {
    /// One loop: an event, one call of the machine, and what it wants done.
    async fn live(mut self, mut orders: watch::Receiver<Order>) {
        let ended = self.shared.ended.clone();
        loop {
            let wake = self
                .machine
                .poll_timeout()
                .filter(|at| *at != Instant::FAR_FUTURE)
                .map(|at| self.clock(at));
            tokio::select! {
                () = ended.cancelled() => break,
                changed = orders.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let order = orders.borrow_and_update().clone();
                    self.obey(order);
                }
                news = self.link.news(self.profile) => self.hear(news),
                () = tokio::time::sleep_until(wake.unwrap_or_else(tokio::time::Instant::now)), if wake.is_some() => self.wake(),
            }
            self.act().await;
        }
        self.reset();
    }

    fn obey(&mut self, order: Order) {
        let now = self.now();
        match order {
            Order::Stay => {}
            Order::Start => self.machine = self.machine_from(now),
            Order::LoseConnection => {
                if self.machine.state() == State::Online {
                    self.reset();
                    self.machine.handle_closed(None, now, &mut self.rng);
                }
            }
            Order::Restart { firmware } => {
                self.reset();
                if let Some(firmware) = firmware {
                    self.config.firmware = Some(firmware);
                }
                self.machine = self.machine_from(now);
            }
        }
    }

    fn hear(&mut self, news: News) {
        let now = self.now();
        match news {
            News::Dialed(Ok(connection)) => {
                self.link = Link::Open {
                    connection,
                    resting: None,
                };
                self.tell(Event::Connected);
                self.machine.handle_connected(now, &mut self.rng);
            }
            News::Dialed(Err(error)) => {
                self.link = Link::None;
                if let Some(refused) = error.refused() {
                    self.tell(Event::Refused(refused.known_code()));
                    self.machine.handle_refused(refused.hint(), now, &mut self.rng);
                } else {
                    self.tell(Event::Failed);
                    self.machine.handle_failed(now, &mut self.rng);
                }
            }
            News::Received(received) => self.receive(received),
            News::Rested => {
                if let Link::Open { resting, .. } = &mut self.link {
                    *resting = None;
                }
            }
        }
    }

    fn receive(&mut self, received: Received) {
        let now = self.now();
        match received {
            Received::Text(text) => self.machine.handle_text(&text, now),
            // The socket has queued the pong, and sends it as it goes on reading.
            Received::Ping(_) => self.machine.handle_ping(now),
            Received::Pong(_) | Received::Binary(_) => {}
            Received::Closed { code, reason } => {
                self.link = Link::None;
                self.tell(Event::Closed(Some(code)));
                let frame = CloseFrame { code, reason: &reason };
                self.machine.handle_closed(Some(frame), now, &mut self.rng);
            }
            Received::Lost => {
                self.link = Link::None;
                self.tell(Event::Closed(None));
                self.machine.handle_closed(None, now, &mut self.rng);
            }
        }
        if let (Profile::SlowReader, Link::Open { resting, .. }) = (self.profile, &mut self.link) {
            *resting = Some(tokio::time::Instant::now() + SLOW_READ);
        }
    }

    fn wake(&mut self) {
        let before = self.machine.state();
        self.machine.handle_timeout(self.now(), &mut self.rng);
        match (before, self.machine.state()) {
            (State::Connecting, State::Waiting) => self.tell(Event::Failed),
            // A flapping or half-open device has left by itself: nobody lost it.
            (State::Online, State::Waiting) if matches!(self.profile, Profile::Flapping | Profile::HalfOpen) => {
                self.shared.recorder.due(self.index, std::time::Instant::now(), false);
            }
            (State::Online, State::Waiting) => self.tell(Event::Closed(None)),
            _ => {}
        }
    }

    async fn act(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Connect => {
                    self.tell(Event::Attempt);
                    self.config.slot = self.machine.slot().map(str::to_owned);
                    self.config.resume = self.machine.resume().map(str::to_owned);
                    let (shared, config) = (Arc::clone(&self.shared), self.config.clone());
                    self.link = Link::Dialing(Box::pin(async move {
                        Connection::open(&shared.url, &config).await.map(Box::new)
                    }));
                }
                Action::Abort => self.reset(),
                Action::SendHeartbeat => self.send(&serde_json::json!({"type": "heartbeat"})).await,
                Action::SendAck { id } => self.send(&serde_json::json!({"type": "ack", "id": id})).await,
            }
        }
    }

    /// A frame that can't be sent means a connection that has ended, which reading will tell.
    async fn send(&mut self, frame: &serde_json::Value) {
        if let Link::Open { connection, .. } = &mut self.link {
            drop(connection.send_json(frame).await);
        }
    }

    /// Ends the connection by a reset, as a device that lost its power or its network, and leaves no TIME_WAIT behind.
    fn reset(&mut self) {
        if let Link::Open { connection, .. } = std::mem::replace(&mut self.link, Link::None) {
            connection.abort();
        }
    }

    fn machine_from(&self, first_attempt_at: Instant) -> Machine {
        Machine::new(self.profile, first_attempt_at).with_connect_timeout(self.connect_timeout)
    }

    fn tell(&self, event: Event) {
        self.shared
            .recorder
            .handle(self.index, event, std::time::Instant::now());
    }

    fn now(&self) -> Instant {
        Instant::ZERO + self.shared.origin.elapsed()
    }

    fn clock(&self, at: Instant) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.shared.origin + at.saturating_since(Instant::ZERO))
    }
}

impl Link {
    /// # Cancel safety
    /// Safe: nothing that was received is lost when it is dropped.
    async fn news(&mut self, profile: Profile) -> News {
        match self {
            Self::None => std::future::pending().await,
            Self::Dialing(dialing) => News::Dialed(dialing.await),
            Self::Open { .. } if profile.is_silent() => std::future::pending().await,
            Self::Open {
                resting: Some(until), ..
            } => {
                tokio::time::sleep_until(*until).await;
                News::Rested
            }
            Self::Open {
                connection,
                resting: None,
            } => News::Received(connection.next_frame().await),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use seawall_proto::refusal::Code;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };
    use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

    use super::*;
    use crate::recorder::Counters;

    const OVERLOADED: &str = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nSeawall-Retry-After-Ms: 120\r\nSeawall-Slot: token\r\n\
        Content-Length: 21\r\nConnection: close\r\n\r\n{\"code\":\"overloaded\"}";

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_device_obeys_the_hint_shows_its_slot_and_connects_again_when_dropped() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        let (fleet, recorder) = fleet_of_one(&url).await;

        fleet.connect(0);
        let (mut first, head) = accept(&listener).await;
        assert!(
            header(&head, "seawall-firmware") == Some("3.8.0-b2") && header(&head, "seawall-slot").is_none(),
            "{head}"
        );
        first.write_all(OVERLOADED.as_bytes()).await.unwrap();
        let (mut second, head) = accept(&listener).await;
        assert!(header(&head, "seawall-slot") == Some("token"), "{head}");
        upgrade(&mut second, &head).await;
        await_connected(&recorder, true).await;

        recorder.due(0, std::time::Instant::now(), true);
        fleet.upgrade(0, "3.8.0-b3");
        assert_eq!(
            second.read(&mut [0; 16]).await.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionReset
        );
        let (mut third, head) = accept(&listener).await;
        assert!(header(&head, "seawall-firmware") == Some("3.8.0-b3"), "{head}");
        upgrade(&mut third, &head).await;
        await_connected(&recorder, true).await;
        fleet.stop().await;

        let (phases, _) = recorder.finish(std::time::Instant::now(), Counters::default());
        let all = &phases[0].groups["all"];
        assert_eq!((all.attempts, all.admitted, all.failed), (3, 2, 0));
        assert_eq!(all.refused, BTreeMap::from([(Code::Overloaded.as_str(), 1)]));
        assert_eq!((phases[0].lost_sessions, all.latency.count), (0, 2));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_session_that_the_server_closes_is_lost_and_no_http_is_a_failure() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        let (fleet, recorder) = fleet_of_one(&url).await;

        fleet.connect(0);
        let (mut first, head) = accept(&listener).await;
        upgrade(&mut first, &head).await;
        await_connected(&recorder, true).await;
        drop(first);
        await_connected(&recorder, false).await;
        assert_eq!(recorder.standing().lost_sessions, 1);
        let (mut second, _) = accept(&listener).await;
        second.write_all(b"who are you?\r\n\r\n").await.unwrap();
        drop(second);
        let third = accept(&listener).await;
        fleet.stop().await;

        drop(third);
        let (phases, _) = recorder.finish(std::time::Instant::now(), Counters::default());
        assert_eq!(phases[0].groups["all"].failed, 1);
        assert_eq!(phases[0].missing, 1);
    }

    async fn fleet_of_one(url: &str) -> (Fleet, Arc<Recorder>) {
        let now = std::time::Instant::now();
        let recorder = Arc::new(Recorder::new(&["3.8.0-b2"], &BTreeMap::new(), now));
        recorder.begin_phase(now, Counters::default());
        recorder.due(0, now, true);
        let device = Device {
            id: uuid::Uuid::new_v4(),
            secret: "s".repeat(64),
            firmware: "3.8.0-b2".to_owned(),
            profile: "well-behaved".to_owned(),
            tenant: None,
            model: Some("display".to_owned()),
            connect_timeout: Duration::from_secs(10),
        };
        (
            Fleet::start(&[device], url, Arc::clone(&recorder), 1).await.unwrap(),
            recorder,
        )
    }

    async fn accept(listener: &TcpListener) -> (TcpStream, String) {
        let (mut stream, _) = within(listener.accept()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            assert_ne!(within(stream.read_buf(&mut head)).await.unwrap(), 0);
        }
        (stream, String::from_utf8(head).unwrap())
    }

    fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
        head.lines()
            .filter_map(|line| line.split_once(": "))
            .find_map(|(of, value)| of.eq_ignore_ascii_case(name).then_some(value))
    }

    async fn upgrade(stream: &mut TcpStream, head: &str) {
        let key = header(head, "sec-websocket-key").unwrap();
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {}\r\n\
             Sec-WebSocket-Protocol: seawall.v1\r\n\r\n",
            derive_accept_key(key.as_bytes())
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    }

    async fn await_connected(recorder: &Recorder, is_connected: bool) {
        within(async {
            while recorder.is_connected(0) != is_connected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    async fn within<T>(work: impl Future<Output = T>) -> T {
        tokio::time::timeout(Duration::from_secs(20), work)
            .await
            .expect("within 20 s")
    }
}
