//! Who may use the API: the admin token in the data directory, and a copy of the tokens in the database.
//!
//! Nothing here asks the database while a request waits. The admin token is checked against `admin.token`, never the database; the
//! others against a copy in memory, which is kept in `tokens.json` (hashes only) and so outlives both database and process. Start
//! with [`Tokens`].

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use seawall_proto::id::SecretHash;
use subtle::ConstantTimeEq as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

mod files;

pub use self::files::random_secret;
use self::files::{make_admin_token, read_admin_token, read_copy, warn_if_open_to_others, write_copy};
use crate::store::{Role, Store, StoreError, TokenRow};

/// File with the admin token, in the data directory, mode 0600.
pub const ADMIN_TOKEN_FILE: &str = "admin.token";
/// The admin token's name in the audit log. No other token may have it.
pub const ADMIN_TOKEN_NAME: &str = "admin.token";
/// Copy of the tokens, in the data directory, mode 0600, hashes only.
const COPY_FILE: &str = "tokens.json";
/// How long a change of `admin.token` may stay unnoticed.
const ADMIN_TOKEN_TRUSTED: Duration = Duration::from_secs(1);
/// How often the tokens are read from the database: a token revoked on another node counts here for at most so long.
const POLL: Duration = Duration::from_secs(5);

/// Whose token a request carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    /// The token's name, as the audit log has it.
    pub name: Arc<str>,
    pub role: Role,
}

/// All tokens in force. Clones share one copy.
#[derive(Clone, Debug)]
pub struct Tokens {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    data_dir: PathBuf,
    /// The admin token as it was read last; `None`: the file is gone, or holds no token.
    admin: Mutex<Option<SecretHash>>,
    issued: Mutex<Issued>,
    /// Held while `tokens.json` is written, so that an older copy never replaces a newer.
    file: Mutex<()>,
    /// Woken by every change of the tokens in force.
    changes: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Issued {
    tokens: Vec<Token>,
    /// Counts local changes, so that what was read from the database before one never undoes it.
    generation: u64,
}

/// A token of the database's.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    id: Uuid,
    name: Arc<str>,
    role: Role,
    hash: SecretHash,
}

/// Why the tokens can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    #[error("the admin token {} can't be read or made: {source}", path.display())]
    Unusable { path: PathBuf, source: io::Error },
    #[error("the admin token {} is not complete: delete the file, the next start makes a new one", path.display())]
    Damaged { path: PathBuf },
}

impl Tokens {
    /// Reads the tokens of a data directory; makes the admin token where there is none.
    ///
    /// # Errors
    /// `admin.token` can't be read or made, or holds no token. An unusable `tokens.json` is only worth a warning: the database
    /// has them all.
    pub fn open(data_dir: &Path) -> Result<Self, TokensError> {
        let path = data_dir.join(ADMIN_TOKEN_FILE);
        let unusable = |source| TokensError::Unusable {
            path: path.clone(),
            source,
        };
        match make_admin_token(&path) {
            Ok(()) => tracing::info!(path = %path.display(), "made an admin token"),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => warn_if_open_to_others(&path),
            Err(error) => return Err(unusable(error)),
        }
        let hash = read_admin_token(&path).map_err(unusable)?;
        if hash.is_none() {
            return Err(TokensError::Damaged { path });
        }
        let tokens = read_copy(&data_dir.join(COPY_FILE)).unwrap_or_else(|error| {
            tracing::warn!(error = %error, "the copy of the tokens can't be read: only the admin token works until the database answers");
            Vec::new()
        });
        Ok(Self {
            inner: Arc::new(Inner {
                data_dir: data_dir.to_owned(),
                admin: Mutex::new(hash),
                issued: Mutex::new(Issued { tokens, generation: 0 }),
                file: Mutex::default(),
                changes: watch::Sender::new(()),
            }),
        })
    }

    /// Whose token this is. Takes as long for a wrong token as for a right one.
    #[must_use]
    pub fn authenticate(&self, presented: &str) -> Option<Principal> {
        self.principal(&SecretHash::of(presented.as_bytes()))
    }

    /// Whose token has this hash. Takes as long for a wrong one as for a right one.
    #[must_use]
    pub fn principal(&self, presented: &SecretHash) -> Option<Principal> {
        let is_admin = self
            .admin_hash()
            .is_some_and(|hash| bool::from(hash.as_bytes().ct_eq(presented.as_bytes())));
        let mut found = is_admin.then(|| Principal {
            name: ADMIN_TOKEN_NAME.into(),
            role: Role::Admin,
        });
        for token in &self.issued().tokens {
            if bool::from(token.hash.as_bytes().ct_eq(presented.as_bytes())) {
                found = Some(Principal {
                    name: Arc::clone(&token.name),
                    role: token.role,
                });
            }
        }
        found
    }

    /// Wakes whenever the tokens in force may have changed: what goes on for long under one token asks again then.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.inner.changes.subscribe()
    }

    /// Tokens in force, the admin token apart.
    #[must_use]
    pub fn len(&self) -> usize {
        self.issued().tokens.len()
    }

    /// Whether there is no token but the admin token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts a token that was just created in force, and writes the copy.
    pub async fn insert(&self, row: &TokenRow) {
        self.alter(|tokens| {
            tokens.retain(|token| token.id != row.id);
            tokens.extend(Token::of(row));
        });
        self.save().await;
    }

    /// Ends a token that was just revoked, and writes the copy.
    pub async fn remove(&self, id: Uuid) {
        self.alter(|tokens| tokens.retain(|token| token.id != id));
        self.save().await;
    }

    /// Reads `admin.token` every second, and the tokens from the database every few, until stopped. While the database is away, the
    /// copy stays in force.
    pub async fn follow(self, store: Store, stop: CancellationToken) {
        tokio::join!(self.follow_file(stop.clone()), self.follow_database(&store, stop));
    }

    async fn follow_file(&self, stop: CancellationToken) {
        let pause = || tokio::time::sleep(ADMIN_TOKEN_TRUSTED);
        let mut was_read = true;
        while stop.run_until_cancelled(pause()).await.is_some() {
            match self.reread_admin_token().await {
                Ok(()) => was_read = true,
                Err(error) => {
                    if was_read {
                        tracing::warn!(error = %error, "admin.token can't be read: the admin token stays as it was");
                    }
                    was_read = false;
                }
            }
        }
    }

    async fn follow_database(&self, store: &Store, stop: CancellationToken) {
        let mut was_read = true;
        loop {
            match self.refresh(store).await {
                Ok(()) => was_read = true,
                Err(error) => {
                    if was_read {
                        tracing::warn!(error = %error, "tokens can't be read from the database: the copy stays in force");
                    }
                    was_read = false;
                }
            }
            if stop.run_until_cancelled(tokio::time::sleep(POLL)).await.is_none() {
                return;
            }
        }
    }

    /// Takes over what the database has.
    ///
    /// # Errors
    /// The database did not answer; the copy stays as it was.
    pub async fn refresh(&self, store: &Store) -> Result<(), StoreError> {
        let generation = self.issued().generation;
        let rows = store.tokens().await?;
        let tokens: Vec<Token> = rows
            .iter()
            .filter(|row| row.revoked_at.is_none())
            .filter_map(Token::of)
            .collect();
        if self.replace(generation, tokens) {
            self.save().await;
        }
        Ok(())
    }

    fn alter(&self, change: impl FnOnce(&mut Vec<Token>)) {
        let mut issued = self.issued();
        issued.generation += 1;
        change(&mut issued.tokens);
        drop(issued);
        self.inner.changes.send_replace(());
    }

    async fn save(&self) {
        let tokens = self.clone();
        // What goes wrong is in the log; there is nobody else to tell.
        let _ = tokio::task::spawn_blocking(move || tokens.write_copy()).await;
    }

    /// True where that changed something. What was read before a local change is dropped: the next reading has both.
    fn replace(&self, generation: u64, tokens: Vec<Token>) -> bool {
        let mut issued = self.issued();
        if issued.generation != generation || issued.tokens == tokens {
            return false;
        }
        issued.tokens = tokens;
        drop(issued);
        self.inner.changes.send_replace(());
        true
    }

    fn admin_hash(&self) -> Option<SecretHash> {
        *self.inner.admin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads `admin.token`, off the runtime's workers. A file that is gone or holds no token ends the admin token.
    ///
    /// # Errors
    /// The file can't be read now (too many open files, a failing disk); the admin token stays as it was.
    async fn reread_admin_token(&self) -> io::Result<()> {
        let path = self.inner.data_dir.join(ADMIN_TOKEN_FILE);
        let reading = tokio::task::spawn_blocking(move || read_admin_token(&path));
        let hash = reading.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)))?;
        let before = {
            let mut admin = self.inner.admin.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *admin, hash)
        };
        if before != hash {
            self.inner.changes.send_replace(());
        }
        Ok(())
    }

    fn write_copy(&self) {
        let _writing = self.inner.file.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = self.issued().tokens.clone();
        if let Err(error) = write_copy(&self.inner.data_dir.join(COPY_FILE), &tokens) {
            tracing::warn!(error = %error, "the copy of the tokens can't be written: a restart without the database would know an older one");
        }
    }

    fn issued(&self) -> MutexGuard<'_, Issued> {
        self.inner.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Token {
    /// `None`: this version does not know what its role may do.
    fn of(row: &TokenRow) -> Option<Self> {
        Some(Self {
            id: row.id,
            name: row.name.as_str().into(),
            role: row.role?,
            hash: row.sha256,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use seawall_proto::time::WallTime;

    use super::*;

    #[test]
    fn first_start_makes_an_admin_token_that_only_the_owner_may_read() {
        let dir = tempfile::tempdir().unwrap();

        let tokens = Tokens::open(dir.path()).unwrap();

        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let token = fs::read_to_string(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(URL_SAFE_NO_PAD.decode(token.trim()).unwrap().len(), 32);
        assert_eq!(tokens.authenticate(token.trim()).map(|who| who.role), Some(Role::Admin));
        assert_eq!(tokens.authenticate(""), None);
        assert_eq!(tokens.authenticate(&random_secret()), None);
    }

    #[tokio::test]
    async fn a_replaced_or_deleted_admin_token_counts_when_it_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let old = fs::read_to_string(&path).unwrap();
        let new = random_secret();

        fs::write(&path, &new).unwrap();
        tokens.reread_admin_token().await.unwrap();

        assert_eq!(tokens.authenticate(old.trim()), None);
        assert!(tokens.authenticate(&new).is_some());
        fs::remove_file(&path).unwrap();
        tokens.reread_admin_token().await.unwrap();
        assert_eq!(tokens.authenticate(&new), None);
    }

    #[tokio::test]
    async fn an_admin_token_that_can_not_be_read_for_a_moment_stays_valid() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let token = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();

        assert!(tokens.reread_admin_token().await.is_err());

        assert!(tokens.authenticate(token.trim()).is_some());
    }

    #[tokio::test]
    async fn each_end_of_a_token_wakes_who_waits_for_changes() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let mut changes = tokens.changes();
        let row = row("ci", Role::Viewer, &random_secret());

        tokens.insert(&row).await;
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        tokens.remove(row.id).await;
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        tokens.reread_admin_token().await.unwrap();
        assert!(!changes.has_changed().unwrap(), "the same file changes nothing");
        fs::write(dir.path().join(ADMIN_TOKEN_FILE), random_secret()).unwrap();
        tokens.reread_admin_token().await.unwrap();
        assert!(changes.has_changed().unwrap());
    }

    #[test]
    fn an_admin_token_survives_a_restart_and_half_of_one_stops_it() {
        let dir = tempfile::tempdir().unwrap();
        drop(Tokens::open(dir.path()).unwrap());
        let path = dir.path().join(ADMIN_TOKEN_FILE);
        let token = fs::read_to_string(&path).unwrap();

        let tokens = Tokens::open(dir.path()).unwrap();

        assert!(tokens.authenticate(token.trim()).is_some());
        fs::write(&path, "").unwrap();
        assert!(matches!(Tokens::open(dir.path()), Err(TokensError::Damaged { .. })));
    }

    #[test]
    fn a_copy_that_can_not_be_kept_leaves_nothing_beside_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(COPY_FILE);
        fs::create_dir(&path).unwrap();

        assert!(write_copy(&path, &[]).is_err());

        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn the_copy_outlives_the_process_and_holds_hashes_only() {
        let dir = tempfile::tempdir().unwrap();
        let secret = random_secret();
        let row = row("ci", Role::Operator, &secret);
        Tokens::open(dir.path()).unwrap().insert(&row).await;

        let tokens = Tokens::open(dir.path()).unwrap();

        let copy = dir.path().join(COPY_FILE);
        assert!(!fs::read_to_string(&copy).unwrap().contains(&secret));
        assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        let who = tokens.authenticate(&secret).unwrap();
        assert_eq!((&*who.name, who.role), ("ci", Role::Operator));
        tokens.remove(row.id).await;
        assert_eq!(tokens.authenticate(&secret), None);
        assert!(Tokens::open(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn damage_of_the_copy_is_described_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(COPY_FILE);
        let hash = "Zm9vYmFyYmF6cXV4MDEyMzQ1Njc4OWFiY2RlZmdoaWo";
        for text in [
            format!("{{\"tokens\":[\"{hash}\"]}}"),
            format!("{{\"tokens\":[{{\"{hash}\":1}}]}}"),
        ] {
            fs::write(&path, text).unwrap();

            let problem = read_copy(&path).unwrap_err().to_string();

            assert!(problem.contains("line 1") && !problem.contains(hash), "{problem}");
        }
    }

    #[tokio::test]
    async fn a_copy_of_a_later_version_is_read_but_for_tokens_of_unknown_roles() {
        let dir = tempfile::tempdir().unwrap();
        let (known, unknown) = (random_secret(), random_secret());
        let hash = |secret: &str| URL_SAFE_NO_PAD.encode(SecretHash::of(secret.as_bytes()).as_bytes());
        let text = format!(
            r#"{{"version":2,"tokens":[
                {{"id":"{}","name":"a","role":"viewer","sha256":"{}","until":7}},
                {{"id":"{}","name":"b","role":"auditor","sha256":"{}"}}]}}"#,
            Uuid::from_u128(1),
            hash(&known),
            Uuid::from_u128(2),
            hash(&unknown)
        );
        fs::write(dir.path().join(COPY_FILE), text).unwrap();

        let tokens = Tokens::open(dir.path()).unwrap();

        assert_eq!(tokens.authenticate(&known).map(|who| who.role), Some(Role::Viewer));
        assert_eq!(tokens.authenticate(&unknown), None);
    }

    #[tokio::test]
    async fn what_was_read_before_a_revocation_does_not_undo_it() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = Tokens::open(dir.path()).unwrap();
        let secret = random_secret();
        let row = row("ci", Role::Viewer, &secret);
        tokens.insert(&row).await;
        let generation = tokens.issued().generation;

        tokens.remove(row.id).await;

        assert!(!tokens.replace(generation, vec![Token::of(&row).unwrap()]));
        assert_eq!(tokens.authenticate(&secret), None);
    }

    fn row(name: &str, role: Role, token: &str) -> TokenRow {
        TokenRow {
            id: Uuid::from_u128(7),
            name: name.to_owned(),
            role: Some(role),
            sha256: SecretHash::of(token.as_bytes()),
            created_at: WallTime::from_unix_ms(1),
            revoked_at: None,
        }
    }
}
