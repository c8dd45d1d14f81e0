//! From PEM files to a configuration of rustls. Every error names the setting and the file.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    server::{NoServerSessionStorage, ProducesTickets, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use seawall_proto::time::WallTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer, time::ASN1Time};

use super::revocation;
use crate::config::Config;

/// Greatest file, in bytes: a list of a million revoked certificates is about 40 MB.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Bytes that a client may send before its handshake is over, in all its messages. A hello with hybrid key shares takes about 2 KiB, and one read
/// may have up to 4 KiB of the request in it.
const HANDSHAKE_LEN_MAX: usize = 8 * 1024;
/// The same for its certificate and those between it and its root: four of RSA 4096 take about 8 KiB.
const CHAIN_LEN_MAX: usize = 16 * 1024;

/// What tells one state of all files from another, without reading them; `None` for one that is not there.
pub type Stamps = [Option<Stamp>; 4];

/// What changes with a file: replaced, written, or made readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The files of one listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    pub certificate: Source,
    pub key: Source,
    pub clients: Option<ClientFiles>,
}

/// What client certificates are verified with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    pub ca: Source,
    pub crl: Option<Source>,
    /// A client without a certificate is sent away.
    pub is_required: bool,
}

/// One file and the setting that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub setting: &'static str,
    pub path: PathBuf,
}

/// Why files can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{}: {} can't be read: {source}", at.setting, at.path.display())]
    Unreadable { at: Source, source: std::io::Error },
    #[error("{}: {}: {problem}", at.setting, at.path.display())]
    Invalid { at: Source, problem: String },
    /// The operating system gives no randomness.
    #[error("TLS can't be set up: {0}")]
    System(String),
}

/// A configuration, and when what it is made from ends.
pub struct Loaded {
    pub server: Arc<ServerConfig>,
    /// When the first certificate of the gateway's chain does.
    pub expires: WallTime,
    /// When the first revocation list should have been replaced. It counts all the same.
    pub lists_until: Option<WallTime>,
    /// Bytes that a client may send before its handshake is over.
    pub handshake_len_max: usize,
}

/// Everything that the files of one listener hold.
pub struct Contents<'a> {
    files: &'a Files,
    certificate: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
    crl: Vec<u8>,
}

impl Source {
    fn new(setting: &'static str, path: &Path) -> Self {
        Self {
            setting,
            path: path.to_owned(),
        }
    }

    fn read(&self) -> Result<Vec<u8>, TlsError> {
        let unreadable = |source| TlsError::Unreadable {
            at: self.clone(),
            source,
        };
        let len = fs::metadata(&self.path).map_err(unreadable)?.len();
        if len > FILE_BYTES_MAX {
            return Err(self.invalid(format!("{len} bytes are more than {FILE_BYTES_MAX}")));
        }
        fs::read(&self.path).map_err(unreadable)
    }

    fn stamp(&self) -> Option<Stamp> {
        let metadata = fs::metadata(&self.path).ok()?;
        Some(Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }

    fn invalid(&self, problem: impl Into<String>) -> TlsError {
        TlsError::Invalid {
            at: self.clone(),
            problem: problem.into(),
        }
    }
}

impl Files {
    /// Those of the listener for devices; `None` where it speaks plain TCP.
    #[must_use]
    pub fn of_devices(config: &Config) -> Option<Self> {
        let tls = &config.tls;
        Some(Self {
            certificate: Source::new("tls.certificate", tls.certificate.as_deref()?),
            key: Source::new("tls.key", tls.key.as_deref()?),
            clients: tls.client_ca.as_deref().map(|ca| ClientFiles {
                ca: Source::new("tls.client_ca", ca),
                crl: tls.client_crl.as_deref().map(|crl| Source::new("tls.client_crl", crl)),
                is_required: tls.client_certificate_required,
            }),
        })
    }

    /// Those of the listener for the API; `None` where it speaks plain TCP.
    #[must_use]
    pub fn of_ops(config: &Config) -> Option<Self> {
        Some(Self {
            certificate: Source::new("ops.tls_certificate", config.ops.tls_certificate.as_deref()?),
            key: Source::new("ops.tls_key", config.ops.tls_key.as_deref()?),
            clients: None,
        })
    }

    /// As they are now; a file that is not asked for has the stamp of the certificate.
    #[must_use]
    pub fn stamps(&self) -> Stamps {
        let clients = self.clients.as_ref();
        let certificate = self.certificate.stamp();
        let optional = |source: Option<&Source>| source.map_or(certificate, Source::stamp);
        [
            certificate,
            self.key.stamp(),
            optional(clients.map(|clients| &clients.ca)),
            optional(clients.and_then(|clients| clients.crl.as_ref())),
        ]
    }

    /// # Errors
    /// A file can't be read.
    pub fn read(&self) -> Result<Contents<'_>, TlsError> {
        let optional = |source: Option<&Source>| source.map_or(Ok(Vec::new()), Source::read);
        let clients = self.clients.as_ref();
        Ok(Contents {
            files: self,
            certificate: self.certificate.read()?,
            key: self.key.read()?,
            ca: optional(clients.map(|clients| &clients.ca))?,
            crl: optional(clients.and_then(|clients| clients.crl.as_ref()))?,
        })
    }
}

impl Contents<'_> {
    /// The gateway's certificate and what stands between it and its root.
    ///
    /// # Errors
    /// There is none.
    pub fn chain(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.files.certificate, &self.certificate)
    }

    /// The authorities of client certificates; none where there is no such file.
    ///
    /// # Errors
    /// There is a file without one.
    pub fn authorities(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        match &self.files.clients {
            Some(clients) => certificates(&clients.ca, &self.ca),
            None => Ok(Vec::new()),
        }
    }

    /// The revocation lists; none where there is no such file.
    ///
    /// # Errors
    /// There is a file without one.
    pub fn lists(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        let Some(crl) = self.files.clients.as_ref().and_then(|clients| clients.crl.as_ref()) else {
            return Ok(Vec::new());
        };
        let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(&self.crl)
            .collect::<Result<_, _>>()
            .map_err(|error| crl.invalid(unreadable_pem("revocation list", &error)))?;
        if lists.is_empty() {
            return Err(crl.invalid("holds no revocation list as PEM"));
        }
        Ok(lists)
    }

    /// # Errors
    /// What the files hold can't be used, or doesn't fit together.
    pub fn load(&self, ticketer: &Arc<dyn ProducesTickets>) -> Result<Loaded, TlsError> {
        let chain = self.chain()?;
        let at_key = &self.files.key;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| at_key.invalid(unreadable_pem("private key", &error)))?;
        let expires = expiry(&self.files.certificate, &chain)?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::System(error.to_string()))?;
        let lists = self.lists()?;
        let (builder, handshake_len_max) = match &self.files.clients {
            Some(clients) => (
                builder.with_client_cert_verifier(self.verifier(clients, &lists)?),
                HANDSHAKE_LEN_MAX + CHAIN_LEN_MAX,
            ),
            None => (builder.with_no_client_auth(), HANDSHAKE_LEN_MAX),
        };
        let mut server = builder.with_single_cert(chain, key).map_err(|error| {
            if matches!(error, rustls::Error::InconsistentKeys(_)) {
                return at_key.invalid(format!("is not the key of {}", self.files.certificate.path.display()));
            }
            at_key.invalid(
                "can't be used with the certificate: expected an RSA key of 2048 to 8192 bits, an ECDSA key on P-256 or P-384, or Ed25519",
            )
        })?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        if self.files.clients.is_some() {
            // A ticket would stand for a certificate that was revoked, or has ended, since.
            server.send_tls13_tickets = 0;
        } else {
            server.ticketer = Arc::clone(ticketer);
            server.send_tls13_tickets = 1;
        }
        Ok(Loaded {
            server: Arc::new(server),
            expires,
            lists_until: revocation::next_update(&lists),
            handshake_len_max,
        })
    }

    fn verifier(
        &self,
        clients: &ClientFiles,
        lists: &[CertificateRevocationListDer<'_>],
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in self.authorities()? {
            roots
                .add(authority)
                .map_err(|_| clients.ca.invalid("holds a certificate that is no authority"))?;
        }
        let (roots, provider) = (Arc::new(roots), provider());
        let algorithms = provider.signature_verification_algorithms;
        let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider);
        if !clients.is_required {
            builder = builder.allow_unauthenticated();
        }
        let verifier = builder
            .build()
            .map_err(|_| clients.ca.invalid("holds no authority that can be used"))?;
        let Some(crl) = &clients.crl else {
            return Ok(verifier);
        };
        match revocation::Verifier::new(verifier, roots, algorithms, lists) {
            Ok(verifier) => Ok(Arc::new(verifier)),
            Err(_) => Err(crl.invalid("holds a revocation list that can't be used")),
        }
    }
}

/// Says that a PEM file holds no such item, and why, without a byte of the file.
///
/// The text of the parser's own error repeats what it read: a private key in which the line ends were lost, all of it. That
/// holds for each of these files, since any of them can be the key's by mistake.
fn unreadable_pem(item: &str, error: &pem::Error) -> String {
    let cause = match error {
        pem::Error::MissingSectionEnd { .. } => "a section has no END line",
        pem::Error::IllegalSectionStart { .. } => {
            "a BEGIN line is malformed; line ends may have been lost or written as \\n"
        }
        pem::Error::Base64Decode(_) => "the text between BEGIN and END is not base64",
        pem::Error::SectionTooLarge => "a section is too large",
        pem::Error::NoItemsFound => return format!("holds no {item} as PEM"),
        pem::Error::Io(_) | _ => "it is malformed",
    };
    format!("holds no {item} as PEM: {cause}")
}

/// The certificates of a PEM file, at least one.
///
/// # Errors
/// There is none, or what stands between the lines is no certificate.
fn certificates(at: &Source, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| at.invalid(unreadable_pem("certificate", &error)))?;
    if certificates.is_empty() {
        return Err(at.invalid("holds no certificate as PEM"));
    }
    Ok(certificates)
}

/// When the first of these ends.
fn expiry(at: &Source, chain: &[CertificateDer<'_>]) -> Result<WallTime, TlsError> {
    let mut first = WallTime::from_unix_ms(u64::MAX);
    for certificate in chain {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|_| at.invalid("holds a certificate that is not X.509"))?;
        first = first.min(wall(parsed.validity().not_after));
    }
    Ok(first)
}

/// Before 1970 is 1970.
pub(super) fn wall(time: ASN1Time) -> WallTime {
    WallTime::from_unix_ms(
        u64::try_from(time.timestamp())
            .unwrap_or_default()
            .saturating_mul(1_000),
    )
}

/// The one crypto provider of this program.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
