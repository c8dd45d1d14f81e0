//! TLS on the listeners: certificates, their reload without dropping anyone, and what client certificates say. Start with [`Endpoint`].
//!
//! rustls with ring, TLS 1.2 and 1.3, rustls's own tickets and no more. A session keeps the certificate that it began with; only
//! newcomers see new files. Files that can't be used change nothing but the log, a metric, `/readyz` and an alarm.

mod bounded;
mod certified;
mod files;
mod follow;
mod inspect;
mod revocation;

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::{
    ServerConfig,
    crypto::ring,
    server::{ProducesTickets, ServerConnection},
};
use seawall_proto::{hello::Certified, time::WallTime};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};

pub use self::{
    bounded::Bounded,
    files::{ClientFiles, Files, Loaded, Stamps, TlsError, provider},
    follow::{follow, reload_now},
    inspect::{Note, inspect},
};
use crate::{config::Config, transport::Transport};

/// A certificate that ends sooner is told to operators.
pub const EXPIRY_NOTICE: Duration = Duration::from_hours(14 * 24);

/// What rustls may hold for a peer that does not read, in bytes: as much as one of its records.
const BUFFER_LEN_MAX: usize = 16 * 1024;

/// The first byte of every TLS connection: the type of a handshake record (RFC 8446 §5.1).
const HANDSHAKE_RECORD: u8 = 0x16;

/// The listeners' TLS; `None` where one speaks plain TCP.
#[derive(Default)]
pub struct Tls {
    pub devices: Option<Endpoint>,
    pub ops: Option<Endpoint>,
    told: Told,
}

/// What operators were told of.
#[derive(Default)]
struct Told {
    is_certificate_ending: AtomicBool,
    is_list_out_of_date: AtomicBool,
}

impl Tls {
    /// # Errors
    /// A file can't be read or used.
    pub fn open(config: &Config) -> Result<Self, TlsError> {
        Ok(Self {
            devices: Files::of_devices(config).map(Endpoint::open).transpose()?,
            ops: Files::of_ops(config).map(Endpoint::open).transpose()?,
            told: Told::default(),
        })
    }

    /// Each with the name of its listener.
    pub fn endpoints(&self) -> impl Iterator<Item = (&'static str, &Endpoint)> {
        [("devices", &self.devices), ("ops", &self.ops)]
            .into_iter()
            .filter_map(|(listener, endpoint)| Some((listener, endpoint.as_ref()?)))
    }

    /// Why files of a listener could not be taken last time, where they could not.
    #[must_use]
    pub fn problem(&self) -> Option<Arc<String>> {
        self.endpoints().find_map(|(_, endpoint)| endpoint.problem())
    }

    /// When the first certificate ends.
    #[must_use]
    pub fn expires(&self) -> Option<WallTime> {
        self.endpoints().map(|(_, endpoint)| endpoint.expires()).min()
    }

    /// When the first revocation list should have been replaced by a newer one; `None` where there is none that says so.
    #[must_use]
    pub fn lists_until(&self) -> Option<WallTime> {
        self.endpoints()
            .filter_map(|(_, endpoint)| endpoint.current.load().lists_until)
            .min()
    }
}

impl Told {
    /// True where operators have not been told so yet.
    fn is_news(told: &AtomicBool, is_so: bool) -> bool {
        told.swap(is_so, Ordering::Relaxed) != is_so
    }
}

/// One listener's TLS, and the files that it is made from.
pub struct Endpoint {
    files: Files,
    /// Shared by all generations: a ticket outlives a renewed certificate.
    ticketer: Arc<dyn ProducesTickets>,
    current: ArcSwap<Loaded>,
    /// Why the files could not be taken last time.
    problem: ArcSwapOption<String>,
    /// Held for as long as files are read, and by nobody else.
    looked: Mutex<Looked>,
}

/// What the last looks at the files have found.
struct Looked {
    /// Last taken or refused: not read again until one changes.
    settled: Stamps,
    /// Seen once: files are replaced one after the other, so that they are taken when two looks agree.
    once: Option<Stamps>,
}

/// Which files are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// Whatever is there: an operator has asked for it.
    Now,
    /// Those that have changed, and not since the last look.
    Changed,
}

/// What became of a look at the files.
#[derive(Debug)]
pub enum Reloaded {
    Unchanged,
    Taken,
    Refused(TlsError),
}

/// Why there is no TLS on a connection.
#[derive(Debug)]
pub enum NoTls {
    /// The peer speaks something else, HTTP by the looks of it: it can be told.
    Plain(TcpStream),
    /// The peer left without a byte.
    Silent,
    /// The handshake failed, or took too long.
    Failed(io::Error),
}

impl Endpoint {
    /// # Errors
    /// A file can't be read or used.
    pub fn open(files: Files) -> Result<Self, TlsError> {
        let ticketer = ring::Ticketer::new().map_err(|error| TlsError::System(error.to_string()))?;
        let settled = files.stamps();
        let loaded = files.read()?.load(&ticketer)?;
        Ok(Self {
            current: ArcSwap::from_pointee(loaded),
            problem: ArcSwapOption::empty(),
            looked: Mutex::new(Looked { settled, once: None }),
            files,
            ticketer,
        })
    }

    /// Begins a handshake with the certificate of now.
    pub fn accept(&self, tcp: TcpStream) -> Accept<Bounded> {
        let current = self.current.load();
        let config: Arc<ServerConfig> = Arc::clone(&current.server);
        let tcp = Bounded::new(tcp, current.handshake_len_max);
        TlsAcceptor::from(config).accept_with(tcp, |connection| connection.set_buffer_limit(Some(BUFFER_LEN_MAX)))
    }

    /// A whole handshake, within this time.
    ///
    /// # Errors
    /// The peer speaks no TLS, or not in time.
    pub async fn accept_within(&self, tcp: TcpStream, time_max: Duration) -> Result<Transport, NoTls> {
        let handshake = async {
            let mut first = [0];
            match tcp.peek(&mut first).await {
                Ok(0) => Err(NoTls::Silent),
                Ok(_) if is_tls(first[0]) => Ok(self.accept(tcp).await.map_err(NoTls::Failed)?),
                Ok(_) => Err(NoTls::Plain(tcp)),
                Err(error) => Err(NoTls::Failed(error)),
            }
        };
        let tls = timeout(time_max, handshake)
            .await
            .map_err(|_| NoTls::Failed(io::ErrorKind::TimedOut.into()))??;
        Ok(tls.into())
    }

    /// Looks at the files, and takes them where they can be used. Blocks.
    pub fn reload(&self, which: Reload) -> Reloaded {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        // Before they are read: a change meanwhile is one that the next look sees.
        let stamps = self.files.stamps();
        if which == Reload::Changed {
            if stamps == looked.settled {
                looked.once = None;
                return Reloaded::Unchanged;
            }
            // A file that is not there is told at once.
            if stamps.iter().all(Option::is_some) && looked.once != Some(stamps) {
                looked.once = Some(stamps);
                return Reloaded::Unchanged;
            }
        }
        looked.once = None;
        let loaded = self.files.read().and_then(|contents| contents.load(&self.ticketer));
        // What can't be read may be good: there may be no more files to be had. It is tried again, and told once.
        if !matches!(loaded, Err(TlsError::Unreadable { .. })) {
            looked.settled = stamps;
        }
        match loaded {
            Ok(loaded) => {
                self.current.store(Arc::new(loaded));
                self.problem.store(None);
                Reloaded::Taken
            }
            Err(error) => {
                let problem = Some(Arc::new(error.to_string()));
                let is_known = self.problem.swap(problem.clone()) == problem;
                if is_known && which == Reload::Changed {
                    return Reloaded::Unchanged;
                }
                Reloaded::Refused(error)
            }
        }
    }

    /// Why the files could not be taken last time, where they could not.
    #[must_use]
    pub fn problem(&self) -> Option<Arc<String>> {
        self.problem.load_full()
    }

    /// When the first of the certificates in use ends.
    #[must_use]
    pub fn expires(&self) -> WallTime {
        self.current.load().expires
    }
}

/// Whether a connection that begins with this byte is one of TLS.
#[must_use]
pub const fn is_tls(first: u8) -> bool {
    first == HANDSHAKE_RECORD
}

/// What the peer's certificate says of the device, where it showed one that names any.
#[must_use]
pub fn certified(tls: &TlsStream<Bounded>) -> Option<Certified> {
    let connection: &ServerConnection = tls.get_ref().1;
    certified::read(connection.peer_certificates()?.first()?)
}
