//! The devices of a run, steered by the phases: those of `firmware-sim`, observed by the recorder.

use std::{sync::Arc, time::Duration};

use firmware_sim::{
    device::CODE_REPLACED,
    driver::{DeviceHandle, DeviceSpec, Driver, Event, Observer},
    identity::Identity,
    target::{Sources, Target},
};
use seawall_proto::{id::DeviceId, time::Instant};

use crate::{
    generator::Lateness,
    plan::Device,
    recorder::{self, Recorder},
};

/// All devices of a run. They end with [`Fleet::stop`], or with the runtime.
#[derive(Debug)]
pub struct Fleet {
    driver: Driver,
    devices: Vec<DeviceHandle>,
}

impl Fleet {
    /// Makes the devices; they wait for [`Self::connect`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn start(devices: &[Device], target: &Target, recorder: Arc<Recorder>, lateness: Lateness, seed: u64) -> Self {
        let sources = Sources::default();
        let driver = Driver::new(
            target.clone(),
            Arc::new(Reporter {
                recorder,
                lateness,
                has_twin: devices.iter().map(|device| device.has_twin).collect(),
            }),
        );
        let devices = devices
            .iter()
            .enumerate()
            .map(|(number, device)| {
                driver.spawn(DeviceSpec {
                    number,
                    identity: Identity {
                        external_id: device.external_id.clone(),
                        id: DeviceId::from_uuid(device.id),
                        secret: device.secret.as_str().into(),
                        tenant: device.tenant.as_deref().map(Arc::from),
                        model: device.model.as_deref().map(Arc::from),
                    },
                    firmware: Some(device.firmware.as_str().into()),
                    profile: device.profile,
                    first_attempt_after: None,
                    source: sources.of(number, target),
                    seed: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number as u64),
                    patience: device.patience,
                    messages_every: device.messages_every,
                    resumes: device.resumes,
                })
            })
            .collect();
        Self { driver, devices }
    }

    /// The device makes its first attempt.
    pub fn connect(&self, index: usize) {
        self.restart(index);
    }

    /// The device's connection is reset; when it returns is its own decision.
    pub fn drop_connection(&self, index: usize) {
        if let Some(device) = self.devices.get(index) {
            device.drop_connection();
        }
    }

    /// The device closes its session, and stays away until it is restarted.
    pub fn leave(&self, index: usize) {
        if let Some(device) = self.devices.get(index) {
            device.leave();
        }
    }

    /// The device neither reads nor writes, and its connection stays open, until it is restarted.
    pub fn cut_power(&self, index: usize) {
        if let Some(device) = self.devices.get(index) {
            device.cut_power();
        }
    }

    /// The device loses its connection and what it kept in memory, and connects at once.
    pub fn restart(&self, index: usize) {
        if let Some(device) = self.devices.get(index) {
            device.restart(Duration::ZERO);
        }
    }

    /// The same, and runs another version from then on.
    pub fn upgrade(&self, index: usize, firmware: &str) {
        if let Some(device) = self.devices.get(index) {
            device.upgrade(Some(firmware.into()), Duration::ZERO);
        }
    }

    /// Ends all devices. Each closes its session with 1000.
    pub async fn stop(self) {
        self.driver.stop().await;
    }
}

/// Passes what devices do to the recorder.
struct Reporter {
    recorder: Arc<Recorder>,
    lateness: Lateness,
    has_twin: Vec<bool>,
}

impl Observer for Reporter {
    fn observe(&self, device: usize, event: Event<'_>, now: Instant) {
        let event = match event {
            Event::Attempt { intended } => {
                self.lateness.attempt(now.saturating_since(intended));
                recorder::Event::Attempt
            }
            Event::Connected => recorder::Event::Connected,
            Event::Refused(refused) => recorder::Event::Refused(refused.known_code()),
            Event::Failed { is_local } => {
                if is_local {
                    self.lateness.local_failure();
                }
                recorder::Event::Failed
            }
            Event::Closed { by_device: true, .. } => recorder::Event::Left,
            Event::Closed {
                code: Some(CODE_REPLACED),
                ..
            } if self.has_twin.get(device) == Some(&true) => recorder::Event::Replaced,
            Event::Closed { code, .. } => recorder::Event::Closed(code),
            Event::Sent => recorder::Event::Sent,
            Event::Acked => recorder::Event::Acked,
            Event::Message | Event::Update | Event::Stopped { .. } => return,
        };
        self.recorder.handle(device, event, std::time::Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use firmware_sim::profile::Profile;
    use seawall_proto::refusal::Code;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };
    use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

    use super::*;
    use crate::{generator::Gauge, recorder::Counters};

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
        let (phases, _) = recorder.finish(std::time::Instant::now(), Counters::default());
        fleet.stop().await;

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
        let (phases, _) = recorder.finish(std::time::Instant::now(), Counters::default());
        drop(third);
        fleet.stop().await;

        assert_eq!(phases[0].groups["all"].failed, 1);
        assert_eq!(phases[0].missing, 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn device_without_power_is_silent_until_it_is_restarted_and_one_that_leaves_says_so() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        let (fleet, recorder) = fleet_of_one(&url).await;
        let ping = [0x89, 0];
        let mut answer = [0; 6];

        fleet.connect(0);
        let (mut first, head) = accept(&listener).await;
        upgrade(&mut first, &head).await;
        first.write_all(&ping).await.unwrap();
        within(first.read_exact(&mut answer)).await.unwrap();
        assert_eq!(answer[0], 0x8a, "a pong");
        fleet.cut_power(0);
        let silence = async {
            // The order may come a moment after this ping.
            first.write_all(&ping).await.unwrap();
            while first.read(&mut [0; 64]).await.unwrap() > 0 {
                first.write_all(&ping).await.unwrap();
            }
        };
        assert!(
            tokio::time::timeout(Duration::from_millis(500), silence).await.is_err(),
            "it closes nothing"
        );

        fleet.restart(0);
        let (mut second, head) = accept(&listener).await;
        upgrade(&mut second, &head).await;
        await_connected(&recorder, true).await;
        fleet.leave(0);
        let mut frame = [0; 8];
        within(second.read_exact(&mut frame)).await.unwrap();
        assert_eq!(frame[0], 0x88, "a close frame");
        drop(second);
        let returned = tokio::time::timeout(Duration::from_millis(1_500), listener.accept()).await;
        fleet.stop().await;

        assert!(returned.is_err(), "it stays away");
    }

    async fn fleet_of_one(url: &str) -> (Fleet, Arc<Recorder>) {
        let now = std::time::Instant::now();
        let recorder = Arc::new(Recorder::new(&["3.8.0-b2"], &BTreeMap::new(), now));
        recorder.begin_phase(now, Counters::default());
        recorder.due(0, now, true);
        let device = Device {
            id: uuid::Uuid::new_v4(),
            external_id: None,
            secret: "s".repeat(64),
            firmware: "3.8.0-b2".to_owned(),
            profile: Profile::WellBehaved,
            has_twin: false,
            tenant: None,
            model: Some("display".to_owned()),
            patience: firmware_sim::device::Patience::default(),
            messages_every: None,
            resumes: false,
        };
        let target = Target::resolve(url).await.unwrap();
        let lateness = Gauge::start().lateness();
        (
            Fleet::start(&[device], &target, Arc::clone(&recorder), lateness, 1),
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
