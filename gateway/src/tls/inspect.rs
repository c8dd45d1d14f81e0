//! What `seawall doctor` says of certificates: whether key and chain fit, and when what ends.

use rustls::{crypto::ring, pki_types::CertificateDer};
use seawall_proto::time::WallTime;
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer, public_key::PublicKey, revocation_list::CertificateRevocationList,
    time::ASN1Time,
};

use super::{EXPIRY_NOTICE, Files, TlsError, files::Contents};

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    Fine(String),
    /// Works, but a person should know.
    Notice(String),
    Wrong(String),
}

/// Looks at the files of one listener.
///
/// # Errors
/// A gateway would not start with them.
pub fn inspect(files: &Files, now: WallTime) -> Result<Vec<Note>, TlsError> {
    let contents = files.read()?;
    let ticketer = ring::Ticketer::new().map_err(|error| TlsError::System(error.to_string()))?;
    contents.load(&ticketer)?;
    let (setting, path) = (files.certificate.setting, files.certificate.path.display());
    let mut notes = vec![Note::Fine(format!(
        "{setting}: {path} can be used, and {} is its key",
        files.key.path.display()
    ))];
    let chain = contents.chain()?;
    let parsed: Vec<X509Certificate<'_>> = chain.iter().filter_map(parse).collect();
    for (number, certificate) in (1..).zip(&parsed) {
        notes.extend(validity(
            &format!("{setting}: certificate {number} of {path}"),
            certificate,
            now,
        ));
    }
    for (number, pair) in (1..).zip(parsed.windows(2)) {
        let is_issued =
            pair[0].issuer() == pair[1].subject() && pair[0].verify_signature(Some(pair[1].public_key())).is_ok();
        if !is_issued {
            notes.push(Note::Wrong(format!(
                "{setting}: certificate {number} of {path} is not issued by certificate {}: devices can't follow the chain",
                number + 1
            )));
        }
    }
    if let Some(leaf) = parsed.first() {
        notes.extend(leaf_notes(setting, leaf, parsed.len()));
    }
    notes.extend(stale_lists(&contents, files, now));
    Ok(notes)
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Option<X509Certificate<'a>> {
    // What can't be parsed has been refused by `load`.
    X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate)
}

fn validity(what: &str, certificate: &X509Certificate<'_>, now: WallTime) -> Option<Note> {
    let end = wall(certificate.validity().not_after);
    let when = certificate.validity().not_after;
    if wall(certificate.validity().not_before) > now {
        return Some(Note::Wrong(format!(
            "{what} counts from {} only: devices refuse it",
            certificate.validity().not_before
        )));
    }
    if end <= now {
        return Some(Note::Wrong(format!("{what} has ended on {when}: devices refuse it")));
    }
    if end < now + EXPIRY_NOTICE {
        return Some(Note::Notice(format!("{what} ends on {when}: renew it")));
    }
    Some(Note::Fine(format!("{what} counts until {when}")))
}

fn leaf_notes(setting: &str, leaf: &X509Certificate<'_>, chain_len: usize) -> Vec<Note> {
    let mut notes = Vec::new();
    if leaf.subject_alternative_name().ok().flatten().is_none() {
        notes.push(Note::Wrong(format!(
            "{setting}: the certificate has no alternative name, and clients look at no other"
        )));
    }
    if leaf.is_ca() {
        notes.push(Note::Notice(format!(
            "{setting}: the first certificate is that of an authority: the gateway's own has to come first"
        )));
    }
    if matches!(leaf.public_key().parsed(), Ok(PublicKey::RSA(_))) {
        notes.push(Note::Notice(format!(
            "{setting}: an RSA key costs several times the CPU of an ECDSA P-256 key in each handshake"
        )));
    }
    if leaf.issuer() == leaf.subject() {
        notes.push(Note::Notice(format!(
            "{setting}: the certificate has signed itself: devices must have been given it"
        )));
    } else if chain_len == 1 {
        notes.push(Note::Notice(format!(
            "{setting}: the file holds one certificate: right only where devices know its issuer ({}) itself",
            leaf.issuer()
        )));
    }
    notes
}

fn stale_lists(contents: &Contents<'_>, files: &Files, now: WallTime) -> Vec<Note> {
    let Some(crl) = files.clients.as_ref().and_then(|clients| clients.crl.as_ref()) else {
        return Vec::new();
    };
    let is_stale = |list: &[u8]| {
        CertificateRevocationList::from_der(list)
            .ok()
            .and_then(|(_, list)| list.next_update())
            .is_some_and(|next| wall(next) < now)
    };
    let stale = contents.lists().filter(|list| is_stale(list)).count();
    if stale == 0 {
        return Vec::new();
    }
    vec![Note::Notice(format!(
        "{}: {} holds {stale} lists that should have been replaced by now; they still count",
        crl.setting,
        crl.path.display()
    ))]
}

/// Before 1970 is 1970.
fn wall(time: ASN1Time) -> WallTime {
    WallTime::from_unix_ms(
        u64::try_from(time.timestamp())
            .unwrap_or_default()
            .saturating_mul(1_000),
    )
}
