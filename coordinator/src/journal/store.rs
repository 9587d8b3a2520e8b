//! The journal's file: `journal.redb` in the cluster's folder, a [`redb`] database of mode 0600.
//!
//! Tables: `meta` (the format's version), `requests` by id, `tokens` by (id, choice, index), `ends`
//! by (id, choice). A commit is durable when it returns; a torn one is undone by redb when the file
//! is opened next. A file of an older version is copied to `journal.redb.vN` and migrated; one of a
//! newer version is refused by name. Not here: when to commit.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use millrace_shared::id::RequestId;
use millrace_shared::sampling::Grammar;
use millrace_shared::wire::codec;
use millrace_shared::wire::rpc::MAX_CHOICES;
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use uuid::Uuid;

use super::record::{End, Entry, Head, Record, Token};
use crate::text::CallForm;
use crate::text::rules::AnswerRules;

/// The format that this program writes.
pub const VERSION: u64 = 5;
/// Name of the file in the cluster's folder.
pub const FILE: &str = "journal.redb";

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const REQUESTS: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("requests");
const TOKENS: TableDefinition<'_, (u128, u32, u32), &[u8]> = TableDefinition::new("tokens");
const ENDS: TableDefinition<'_, (u128, u32), &[u8]> = TableDefinition::new("ends");
const VERSION_KEY: &str = "version";
/// Pages that redb may keep in memory; the hot ones are few.
const CACHE_BYTES: usize = 8 << 20;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another program has it.
    #[error(
        "{0} is in use by another coordinator: stop that one, or give this one a folder of its own \
         with --dir"
    )]
    InUse(PathBuf),
    /// Written by a newer program.
    #[error(
        "{path} has format version {found}, this program knows versions up to {known}: run the \
         newer program, or move the file away (its requests are lost to their clients then)"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The newest that is known.
        known: u64,
    },
    /// Nothing that this program wrote.
    #[error("{path} cannot be read as a journal ({why}): move it away to start with an empty one")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// Reading or writing failed.
    #[error("{path}: {why}")]
    Failed {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// Turns a file of one version into one of the next.
pub(super) type Migration = fn(&WriteTransaction) -> Result<(), redb::Error>;
/// `MIGRATIONS[i]` leads from version `i + 1` to `i + 2`.
const MIGRATIONS: &[Migration] = &[count_choices, without_grammar, without_calls, without_rules];

/// To version 2: a request says how many of its choices are sent, which was the one.
fn count_choices(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    rewrite_requests(transaction, |value| {
        value.extend(codec::encode(&1u32));
        Ok(())
    })
}

/// What stood before the grammar in a [`Head`](super::Head) of version 2: id, model, prompt, and the
/// fields of the sampling parameters.
type BeforeGrammar = (
    RequestId,
    [u8; 32],
    Vec<u32>,
    (f32, u32, f32, f32, f32, f32, f32, Vec<(u32, f32)>, Option<u64>, Option<u32>),
    (Vec<String>, Vec<u32>, bool, Option<u8>),
);

/// Where the grammar belongs in an encoded head.
fn place_of_grammar(value: &[u8]) -> Result<usize, redb::Error> {
    let (_, length) = codec::decode_first::<BeforeGrammar>(value)
        .map_err(|e| redb::Error::Corrupted(format!("a request of version 2: {e}")))?;
    Ok(length)
}

/// 2 to 3: requests may have a grammar; none had.
fn without_grammar(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    rewrite_requests(transaction, |value| {
        let at = place_of_grammar(value)?;
        value.splice(at..at, codec::encode(&None::<Grammar>));
        Ok(())
    })
}

/// 3 to 4: requests may have tools, and an API's note; none had.
fn without_calls(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    rewrite_requests(transaction, |value| {
        value.extend(codec::encode(&(None::<CallForm>, Vec::<u8>::new())));
        Ok(())
    })
}

/// 4 to 5: answers may have rules, and prompts may have been changed; none had or were.
fn without_rules(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    rewrite_requests(transaction, |value| {
        value.extend(codec::encode(&(None::<AnswerRules>, 0u32, false)));
        Ok(())
    })
}

fn rewrite_requests(
    transaction: &WriteTransaction,
    change: impl Fn(&mut Vec<u8>) -> Result<(), redb::Error>,
) -> Result<(), redb::Error> {
    let mut requests = transaction.open_table(REQUESTS)?;
    let mut changed = Vec::new();
    for row in requests.iter()? {
        let (id, value) = row?;
        let mut value = value.value().to_vec();
        change(&mut value)?;
        changed.push((id.value(), value));
    }
    for (id, value) in changed {
        requests.insert(id, value.as_slice())?;
    }
    Ok(())
}

/// Where records go. The writer thread knows only this.
pub(super) trait Store: Send {
    /// Makes all of them durable, or none.
    ///
    /// # Errors
    /// If they cannot be written.
    fn write(&mut self, records: &[Record]) -> Result<(), JournalError>;

    /// Makes these, and nothing else, what is kept.
    ///
    /// # Errors
    /// If they cannot be written; what was kept before may then be lost.
    fn replace(&mut self, records: &[Record]) -> Result<(), JournalError>;

    /// Writes next to nothing, to see whether anything can be written.
    ///
    /// # Errors
    /// If it cannot.
    fn probe(&mut self) -> Result<(), JournalError>;
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct FileStore {
    path: PathBuf,
    /// `None` after a failure, until it can be opened again.
    database: Option<Database>,
}

fn failed(path: &Path, e: impl Into<redb::Error>) -> JournalError {
    match e.into() {
        redb::Error::DatabaseAlreadyOpen => JournalError::InUse(path.to_owned()),
        e @ (redb::Error::Corrupted(_)
        | redb::Error::UpgradeRequired(_)
        | redb::Error::TableTypeMismatch { .. }) => {
            JournalError::Unreadable { path: path.to_owned(), why: e.to_string() }
        }
        redb::Error::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            JournalError::Unreadable { path: path.to_owned(), why: e.to_string() }
        }
        e => JournalError::Failed { path: path.to_owned(), why: e.to_string() },
    }
}

fn open_database(path: &Path) -> Result<Database, JournalError> {
    let io = |e: std::io::Error| failed(path, redb::Error::Io(e));
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path).map_err(io)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(io)?;
    }
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let backend = FileBackend::new(file).map_err(|e| failed(path, e))?;
    builder.create_with_backend(backend).map_err(|e| failed(path, e))
}

impl FileStore {
    /// Opens the journal in `dir`, or makes it; also returns what it holds.
    ///
    /// # Errors
    /// If another program has it, a newer one wrote it, or it cannot be read.
    pub(super) fn open(dir: &Path) -> Result<(Self, Vec<Entry>), JournalError> {
        Self::open_as(dir, VERSION, MIGRATIONS)
    }

    /// [`FileStore::open`] for a program that writes `version`.
    pub(super) fn open_as(
        dir: &Path,
        version: u64,
        migrations: &[Migration],
    ) -> Result<(Self, Vec<Entry>), JournalError> {
        let path = dir.join(FILE);
        let mut database = open_database(&path)?;
        let found = version_of(&database).map_err(|e| failed(&path, e))?;
        match found {
            Some(found) if found > version => {
                return Err(JournalError::Newer { path, found, known: version });
            }
            Some(found) if found < version => {
                drop(database);
                copy_aside(&path, found)?;
                database = open_database(&path)?;
                migrate(&database, found, version, migrations).map_err(|e| failed(&path, e))?;
                tracing::info!(
                    "the journal was migrated from version {found} to {version}; the old file is \
                     kept as {FILE}.v{found}"
                );
            }
            Some(_) => {}
            None => prepare(&database, version).map_err(|e| failed(&path, e))?,
        }
        let entries = load(&database, &path)?;
        Ok((Self { path, database: Some(database) }, entries))
    }

    fn transact(
        &mut self,
        work: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), JournalError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open_database(&self.path)?,
        };
        let done = (|| {
            let transaction = database.begin_write()?;
            work(&transaction)?;
            transaction.commit()?;
            Ok::<_, redb::Error>(())
        })();
        // After an error redb refuses everything until it is opened anew.
        done.map_err(|e| failed(&self.path, e))?;
        self.database = Some(database);
        Ok(())
    }
}

impl Store for FileStore {
    fn write(&mut self, records: &[Record]) -> Result<(), JournalError> {
        self.transact(|transaction| put(transaction, records))
    }

    fn replace(&mut self, records: &[Record]) -> Result<(), JournalError> {
        self.transact(|transaction| {
            transaction.delete_table(REQUESTS)?;
            transaction.delete_table(TOKENS)?;
            transaction.delete_table(ENDS)?;
            transaction.open_table(META)?.insert(VERSION_KEY, VERSION)?;
            put(transaction, records)
        })
    }

    fn probe(&mut self) -> Result<(), JournalError> {
        self.transact(|transaction| {
            transaction.open_table(META)?.insert(VERSION_KEY, VERSION)?;
            Ok(())
        })
    }
}

fn put(transaction: &WriteTransaction, records: &[Record]) -> Result<(), redb::Error> {
    let mut requests = transaction.open_table(REQUESTS)?;
    let mut tokens = transaction.open_table(TOKENS)?;
    let mut ends = transaction.open_table(ENDS)?;
    for record in records {
        match record {
            Record::Request(head) => {
                requests.insert(head.id.0.as_u128(), codec::encode(head.as_ref()).as_slice())?;
            }
            Record::Token { request, choice, index, token } => {
                let key = (request.0.as_u128(), *choice, *index);
                tokens.insert(key, codec::encode(token).as_slice())?;
            }
            Record::End { request, choice, at_ms, end } => {
                let value = codec::encode(&(*at_ms, end));
                ends.insert((request.0.as_u128(), *choice), value.as_slice())?;
            }
            Record::Erase(request) => {
                let id = request.0.as_u128();
                requests.remove(id)?;
                tokens.retain_in((id, 0, 0)..=(id, u32::MAX, u32::MAX), |_, _| false)?;
                ends.retain_in((id, 0)..=(id, u32::MAX), |_, _| false)?;
            }
        }
    }
    Ok(())
}

fn version_of(database: &Database) -> Result<Option<u64>, redb::Error> {
    let transaction = database.begin_read()?;
    match transaction.open_table(META) {
        Ok(table) => Ok(table.get(VERSION_KEY)?.map(|v| v.value())),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn prepare(database: &Database, version: u64) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(META)?.insert(VERSION_KEY, version)?;
    put(&transaction, &[])?;
    transaction.commit()?;
    Ok(())
}

fn copy_aside(path: &Path, version: u64) -> Result<(), JournalError> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".v{version}"));
    // The copy takes the mode of the file.
    let copied = fs::copy(path, &name).and_then(|_| fs::File::open(&name)?.sync_all());
    copied.map_err(|e| failed(path, redb::Error::Io(e)))
}

fn migrate(
    database: &Database,
    from: u64,
    to: u64,
    migrations: &[Migration],
) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    for step in from..to {
        let missing = || redb::Error::UpgradeRequired(u8::try_from(step).unwrap_or(u8::MAX));
        let index = usize::try_from(step).ok().and_then(|s| s.checked_sub(1));
        let migration = index.and_then(|i| migrations.get(i)).ok_or_else(missing)?;
        migration(&transaction)?;
    }
    transaction.open_table(META)?.insert(VERSION_KEY, to)?;
    transaction.commit()?;
    Ok(())
}

/// Everything, in the order in which requests came.
fn load(database: &Database, path: &Path) -> Result<Vec<Entry>, JournalError> {
    let wrong = |why: String| JournalError::Unreadable { path: path.to_owned(), why };
    let mut entries = BTreeMap::<u128, Entry>::new();
    let read = || {
        let transaction = database.begin_read()?;
        let requests = transaction.open_table(REQUESTS)?;
        let tokens = transaction.open_table(TOKENS)?;
        let ends = transaction.open_table(ENDS)?;
        Ok::<_, redb::Error>((requests, tokens, ends))
    };
    let (requests, tokens, ends) = read().map_err(|e| failed(path, e))?;
    for row in requests.iter().map_err(|e| failed(path, e))? {
        let (id, value) = row.map_err(|e| failed(path, e))?;
        let head: Head = codec::decode(value.value()).map_err(|e| wrong(e.to_string()))?;
        if !(1..=head.choices).contains(&head.n)
            || head.choices as usize > MAX_CHOICES
            || head.id != RequestId(Uuid::from_u128(id.value()))
        {
            return Err(wrong(format!("request {:032x} is not what its name says", id.value())));
        }
        entries.insert(id.value(), Entry::new(Arc::new(head)));
    }
    for row in tokens.iter().map_err(|e| failed(path, e))? {
        let (key, value) = row.map_err(|e| failed(path, e))?;
        let (id, choice, index) = key.value();
        let token: Token = codec::decode(value.value()).map_err(|e| wrong(e.to_string()))?;
        let log = entries.get_mut(&id).and_then(|e| e.tokens.get_mut(choice as usize));
        match log {
            Some(log) if log.len() == index as usize => log.push(token),
            _ => return Err(wrong(format!("token {index} of {id:032x} has no place"))),
        }
    }
    for row in ends.iter().map_err(|e| failed(path, e))? {
        let (key, value) = row.map_err(|e| failed(path, e))?;
        let (id, choice) = key.value();
        let end: (u64, End) = codec::decode(value.value()).map_err(|e| wrong(e.to_string()))?;
        let place = entries.get_mut(&id).and_then(|e| e.ends.get_mut(choice as usize));
        *place.ok_or_else(|| wrong(format!("the end of {id:032x} has no place")))? = Some(end);
    }
    let mut entries: Vec<Entry> = entries.into_values().collect();
    entries.sort_by_key(|e| (e.head.submitted_ms, e.head.id));
    Ok(entries)
}

/// Makes the file in `dir` one that version 1 wrote.
#[cfg(test)]
pub(super) fn as_version(old: u64, dir: &Path) {
    let database = open_database(&dir.join(FILE)).expect("the file");
    let transaction = database.begin_write().expect("a transaction");
    {
        let mut requests = transaction.open_table(REQUESTS).expect("the table");
        let all: Vec<(u128, Vec<u8>)> = (requests.iter().expect("rows").flatten())
            .map(|(id, value)| (id.value(), value.value().to_vec()))
            .collect();
        for (id, mut value) in all {
            assert_eq!(value.split_off(value.len() - 3), [0, 0, 0], "no rules, nothing changed");
            if old < 4 {
                assert_eq!(value.split_off(value.len() - 2), [0, 0], "neither tools nor a note");
            }
            if old < 3 {
                assert_eq!(value.remove(place_of_grammar(&value).expect("a head")), 0);
            }
            if old == 1 {
                value.pop();
            }
            requests.insert(id, value.as_slice()).expect("room");
        }
        transaction.open_table(META).expect("a table").insert(VERSION_KEY, old).expect("room");
    }
    transaction.commit().expect("room");
}
