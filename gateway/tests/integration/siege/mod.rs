//! Attacks on real sockets, against the real binary. During an attack, devices are admitted, and the process stays
//! small. Afterwards nothing is left of it. Start with [`Siege`].

mod handshakes;
mod leaving;
mod secrets;
mod sessions;

use std::{
    fs,
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use firmware_sim::{
    connection::{Connection, DeviceConfig},
    tls::Trust,
};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    harness::{
        authority::Authority,
        devices::{assert_alive, device},
        process::GatewayProcess,
        wait::{PATIENCE, eventually},
    },
    scarce::import,
};

/// Number of devices that connect during the attack, one after the other. The second slowest is their 99th percentile.
const DEVICES: u32 = 100;
const DEVICE_INTERVAL: Duration = Duration::from_millis(15);
/// Maximum time that a device waits for its session, in 99 of 100 cases.
const WAIT_MAX: Duration = Duration::from_secs(1);
/// Rounds of devices. Each must pass.
const ROUNDS: usize = 3;
/// Delay of the test's own timer at which a round is repeated: then the machine had no time for the test itself, and
/// the device's wait says nothing about the gateway.
const TIMER_LATE_MAX: Duration = Duration::from_millis(250);
/// Maximum number of repeated rounds. Beyond it the machine is too busy to measure.
const REPEATS_MAX: usize = 6;
/// Maximum additional memory during an attack, in KiB: 25 KB for each of at most 2,500 handshakes with TLS, and buffers
/// of sessions.
const GROWN_MAX_KIB: u64 = 120 * 1024;
/// Open files that SQLite and the API open when needed. Attacks open hundreds.
const FILES_OF_OTHERS: usize = 16;
/// A device that stays online.
const WITNESS: u32 = 0;
/// Number of devices that attackers control.
const STOLEN: u32 = 1_000;
const STOLEN_MAX: u32 = 20;

/// A gateway under attack.
pub struct Siege {
    pub gateway: GatewayProcess,
    pub address: SocketAddr,
    authority: Option<Authority>,
    attackers: JoinSet<()>,
    is_over: CancellationToken,
    witness: Connection,
    files: usize,
    memory_kib: u64,
}

impl Siege {
    /// With these settings (TOML) over the defaults.
    pub async fn of_tcp(settings: &str) -> Self {
        Self::begin(None, settings).await
    }

    pub async fn of_tls(settings: &str) -> Self {
        let mut authority = Authority::new();
        let settings = format!("{}{settings}", authority.settings());
        Self::begin(Some(authority), &settings).await
    }

    async fn begin(authority: Option<Authority>, settings: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join("seawall.toml");
        fs::write(&config, settings).unwrap();
        let gateway = spawn_blocking(move || GatewayProcess::start(&["--config", config.to_str().unwrap()]))
            .await
            .unwrap()
            .unwrap();
        import(&gateway, 0..DEVICES + 1);
        import(&gateway, STOLEN..STOLEN + STOLEN_MAX);
        let address = gateway.addresses.devices;
        // One-time allocations must not be taken for remains of the attack.
        for number in 1..20 {
            drop(open(address, authority.as_ref(), number).await);
        }
        let witness = open(address, authority.as_ref(), WITNESS).await;
        eventually(|| gateway.metric("seawall_sessions ").unwrap() == 1).await;
        let mut siege = Self {
            address,
            authority,
            attackers: JoinSet::new(),
            is_over: CancellationToken::new(),
            witness,
            files: 0,
            memory_kib: 0,
            gateway,
        };
        (siege.files, siege.memory_kib) = (siege.open_files(), siege.resident_kib());
        siege
    }

    /// The CA of a gateway with TLS.
    pub fn authority(&self) -> &Authority {
        self.authority.as_ref().expect("a siege over TLS")
    }

    /// Starts `count` attackers, which run until the siege ends. `attack` gets its number.
    pub fn attack<F: Future<Output = ()> + Send + 'static>(&mut self, count: usize, attack: impl Fn(usize) -> F) {
        for number in 0..count {
            let (attack, is_over) = (attack(number), self.is_over.clone());
            self.attackers.spawn(async move {
                // Endless, and dropped with its connection.
                let _ = is_over.run_until_cancelled(attack).await;
            });
        }
    }

    /// Waits until the attack has built up: `handshakes` are running.
    pub async fn is_on(&self, handshakes: u64) {
        eventually(|| self.gateway.metric("seawall_handshakes_under_way").unwrap() >= handshakes).await;
    }

    /// Devices connect during the attack. Then it ends, and nothing is left of it.
    pub async fn survives(mut self) {
        let mut waits = Vec::new();
        let mut grown = 0;
        for _ in 0..ROUNDS + REPEATS_MAX {
            sleep(Duration::from_millis(300)).await;
            let (wait, timer_late) = self.round().await;
            grown = self.resident_kib().saturating_sub(self.memory_kib).max(grown);
            if wait <= WAIT_MAX || timer_late <= TIMER_LATE_MAX {
                waits.push(wait);
            }
            if waits.len() == ROUNDS {
                break;
            }
        }
        println!("99 of 100 devices waited {waits:?} at most; {grown} KiB more than in peace");
        assert_alive(&mut self.witness).await;
        assert_eq!(waits.len(), ROUNDS, "the machine is too busy to measure: {waits:?}");
        assert!(waits.iter().all(|wait| *wait <= WAIT_MAX), "{waits:?}");
        assert!(grown <= GROWN_MAX_KIB, "{grown} KiB");
        self.is_over.cancel();
        while self.attackers.join_next().await.is_some() {}
        self.leaves_nothing().await;
    }

    /// Maximum wait of 99 in 100 devices, and the maximum delay of the test's timer meanwhile.
    async fn round(&self) -> (Duration, Duration) {
        let mut connecting = JoinSet::new();
        let mut timer_late = Duration::ZERO;
        for number in 1..=DEVICES {
            let (address, config) = (self.address, config(self.authority.as_ref(), number));
            let url = url(address, self.authority.as_ref());
            connecting.spawn(timeout(PATIENCE, get_in(url, config)));
            let begun = Instant::now();
            sleep(DEVICE_INTERVAL).await;
            timer_late = timer_late.max(begun.elapsed().saturating_sub(DEVICE_INTERVAL));
        }
        let waits = connecting.join_all().await;
        let mut waits: Vec<Duration> = waits.into_iter().map(Result::unwrap).collect();
        waits.sort_unstable();
        (waits[waits.len() - 2], timer_late)
    }

    /// Asserts that only the witness is left.
    pub async fn leaves_nothing(mut self) {
        for (series, expected) in [
            ("seawall_sessions ", 1),
            ("seawall_handshakes_under_way", 0),
            ("seawall_admission_queue ", 0),
            ("seawall_lookups_in_flight ", 0),
        ] {
            eventually(|| self.gateway.metric(series).unwrap() == expected).await;
        }
        eventually(|| self.open_files() <= self.files + FILES_OF_OTHERS).await;
        assert_eq!(self.gateway.metric("seawall_task_panics_total").unwrap(), 0);
        let connections = self
            .gateway
            .metric("seawall_connections_total{outcome=\"request\"}")
            .unwrap();
        assert_eq!(self.gateway.metric("seawall_handshakes_total{").unwrap(), connections);
        assert_alive(&mut self.witness).await;
    }

    fn open_files(&self) -> usize {
        let pid = self.gateway.pid().unwrap().as_raw_nonzero();
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
    }

    fn resident_kib(&self) -> u64 {
        let pid = self.gateway.pid().unwrap().as_raw_nonzero();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
    }
}

/// Time that a device waits for its session. On a busy machine it may be refused with a slot, and returns then.
async fn get_in(url: String, mut config: DeviceConfig) -> Duration {
    let begun = Instant::now();
    loop {
        let error = match Connection::open(&url, &config).await {
            Ok(_) => return begun.elapsed(),
            Err(error) => error,
        };
        let refused = error.refused().unwrap_or_else(|| panic!("not answered: {error:?}"));
        assert_eq!(refused.status, 503, "{refused:?}");
        config.slot = Some(refused.slot.clone().expect("a slot"));
        sleep(Duration::from_millis(refused.retry_after_ms.expect("a hint"))).await;
    }
}

fn url(address: SocketAddr, authority: Option<&Authority>) -> String {
    let scheme = authority.map_or("ws", |_| "wss");
    format!("{scheme}://{address}")
}

fn config(authority: Option<&Authority>, number: u32) -> DeviceConfig {
    let mut config = device(number);
    if let Some(authority) = authority {
        config.trust = Trust::File(authority.path("ca.pem"));
    }
    config
}

async fn open(address: SocketAddr, authority: Option<&Authority>, number: u32) -> Connection {
    let config = config(authority, number);
    Connection::open(&url(address, authority), &config).await.unwrap()
}

/// Attackers use other addresses than devices. `number` selects one of `addresses`.
pub fn one_of(addresses: usize, number: usize) -> Ipv4Addr {
    let [high, low] = u16::try_from(number % addresses).unwrap().to_be_bytes();
    Ipv4Addr::new(127, 1, high, low.max(1))
}

/// A connection from `source` that ends with a reset, so that it leaves nothing in the kernel.
pub async fn dial_from(source: Ipv4Addr, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::V4(source), 0))?;
    let stream = socket.connect(address).await?;
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    Ok(stream)
}
