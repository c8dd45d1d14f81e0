//! Loads PEM files into a configuration of rustls. Every error names the setting and the file.

use std::{
    collections::HashSet,
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
use seawall_proto::{id::CertificateTag, time::WallTime};
use x509_parser::{certificate::X509Certificate, prelude::FromDer, time::ASN1Time};

use super::revocation;
use crate::runtime::config::Config;

/// Maximum file size, in bytes. A list of a million revoked certificates takes about 40 MB.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Maximum number of bytes from a client before its handshake is complete. A hello with hybrid key shares takes about 2
/// KiB, and one read may include up to 4 KiB of the request.
const HANDSHAKE_LEN_MAX: usize = 8 * 1024;
/// The same for the client's certificate chain: four certificates with RSA 4096 take about 8 KiB.
const CHAIN_LEN_MAX: usize = 16 * 1024;

/// Stamps of all files, to detect changes without reading them; `None` for a missing file.
pub type Stamps = [Option<Stamp>; 4];

/// Changes when a file is replaced, written, or made readable.
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

/// Files for verifying client certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    pub ca: Source,
    pub crl: Option<Source>,
    /// Whether a client without a certificate is rejected.
    pub is_required: bool,
}

/// One file and the setting that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub setting: &'static str,
    pub path: PathBuf,
}

/// Why files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{}: {} can't be read: {source}", at.setting, at.path.display())]
    Unreadable { at: Source, source: std::io::Error },
    #[error("{}: {}: {problem}", at.setting, at.path.display())]
    Invalid { at: Source, problem: String },
    /// The operating system provides no randomness.
    #[error("TLS can't be set up: {0}")]
    System(String),
}

/// A configuration, and the expiry of the files that it was made from.
pub struct Loaded {
    pub server: Arc<ServerConfig>,
    /// Expiry of the first certificate of the gateway's chain to expire.
    pub expires: WallTime,
    /// Time at which the first revocation list should be replaced. It stays in use after that.
    pub lists_until: Option<WallTime>,
    /// Client certificates that the revocation lists name.
    pub revoked: HashSet<CertificateTag>,
    /// Maximum number of bytes from a client before its handshake is complete.
    pub handshake_len_max: usize,
}

/// Contents of the files of one listener.
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
    /// Files of the device listener; `None` if it speaks plain TCP.
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

    /// Files of the API listener; `None` if it speaks plain TCP.
    #[must_use]
    pub fn of_ops(config: &Config) -> Option<Self> {
        Some(Self {
            certificate: Source::new("ops.tls_certificate", config.ops.tls_certificate.as_deref()?),
            key: Source::new("ops.tls_key", config.ops.tls_key.as_deref()?),
            clients: None,
        })
    }

    /// The current stamps. A file that is not configured has the stamp of the certificate.
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
    /// A file cannot be read.
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
    /// The gateway's certificate and its intermediates.
    ///
    /// # Errors
    /// There is none.
    pub fn chain(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.files.certificate, &self.certificate)
    }

    /// The CAs of client certificates; none if there is no such file.
    ///
    /// # Errors
    /// The file contains none.
    pub fn authorities(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        match &self.files.clients {
            Some(clients) => certificates(&clients.ca, &self.ca),
            None => Ok(Vec::new()),
        }
    }

    /// The revocation lists; none if there is no such file.
    ///
    /// # Errors
    /// The file contains none.
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
    /// The files are invalid, or do not match each other.
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
            // A ticket would replace a certificate that was revoked, or has expired, since.
            server.send_tls13_tickets = 0;
        } else {
            server.ticketer = Arc::clone(ticketer);
            server.send_tls13_tickets = 1;
        }
        Ok(Loaded {
            server: Arc::new(server),
            expires,
            lists_until: revocation::next_update(&lists),
            revoked: revocation::revoked(&lists),
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
                .map_err(|_| clients.ca.invalid("contains a certificate that is not a CA"))?;
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

/// The error for a PEM file without such an item, with the cause, and without a byte of the file.
///
/// The parser's own error repeats what it read: all of a private key whose line ends were lost. Any of these files may
/// be the key by mistake.
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
/// There is none, or the PEM content is not a certificate.
fn certificates(at: &Source, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| at.invalid(unreadable_pem("certificate", &error)))?;
    if certificates.is_empty() {
        return Err(at.invalid("holds no certificate as PEM"));
    }
    Ok(certificates)
}

/// Expiry of the first of these to expire.
fn expiry(at: &Source, chain: &[CertificateDer<'_>]) -> Result<WallTime, TlsError> {
    let mut first = WallTime::from_unix_ms(u64::MAX);
    for certificate in chain {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|_| at.invalid("holds a certificate that is not X.509"))?;
        first = first.min(wall(parsed.validity().not_after));
    }
    Ok(first)
}

/// Times before 1970 become 1970.
pub(super) fn wall(time: ASN1Time) -> WallTime {
    WallTime::from_unix_ms(
        u64::try_from(time.timestamp())
            .unwrap_or_default()
            .saturating_mul(1_000),
    )
}

/// The crypto provider of this program.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
