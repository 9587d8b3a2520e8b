//! Reads calls out of JSON as it comes, character by character.
//!
//! Takes one object or a list of them, with `name` and `arguments` (or `parameters`) in any order,
//! or a bare name before its arguments. Arguments are handed on as the model wrote them; nothing of a
//! call is before its name is known and its arguments have begun.

/// What a character brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A call of the tool of this name begins.
    Opened(String),
    /// More of its arguments.
    Arguments(String),
    /// Nothing more belongs to the calls.
    Over,
}

/// It is no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// Where in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before an object, a list or a bare name.
    Before,
    /// A name that stands by itself.
    Bare,
    /// Inside an object, before a key.
    Key,
    /// Inside a key.
    InKey,
    /// Behind a key.
    Colon,
    /// Before a value.
    Value,
    /// Inside a value.
    InValue,
    /// Behind a value, in its object.
    AfterValue,
    /// Behind an object.
    AfterCall,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    place: Place,
    /// Whether calls may be written as a bare name and arguments.
    bare: bool,
    /// Whether the objects are in a list.
    listed: bool,
    /// The key, as JSON, or the bare name.
    key: String,
    /// The value so far, where it is not handed on at once.
    value: String,
    name: Option<String>,
    /// Whether the arguments have begun.
    arguments: bool,
    /// Whether the call was opened.
    opened: bool,
    /// Arguments that came before the name.
    held: String,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// Whether the value is a string.
    quoted: bool,
    /// Whether the call is a bare name and arguments.
    is_bare: bool,
}

impl Reader {
    /// Before the first character. `bare` lets calls be a name and arguments.
    pub(super) fn new(bare: bool) -> Self {
        Self {
            place: Place::Before,
            bare,
            listed: false,
            key: String::new(),
            value: String::new(),
            name: None,
            arguments: false,
            opened: false,
            held: String::new(),
            depth: 0,
            in_string: false,
            escaped: false,
            quoted: false,
            is_bare: false,
        }
    }

    /// Takes a character; what is found goes to `found`. After [`Found::Over`] there must be no more;
    /// the character that brought it belongs to the calls only where it is a closing bracket.
    ///
    /// # Errors
    /// If this is no call.
    pub(super) fn push(&mut self, c: char, found: &mut Vec<Found>) -> Result<(), Broken> {
        let space = c.is_whitespace();
        match self.place {
            Place::Before | Place::Key | Place::Colon | Place::Value | Place::AfterValue
                if space => {}
            Place::Before => self.begin(c)?,
            Place::Bare if c == '{' => {
                let name = self.key.split('[').next().unwrap_or_default().trim().to_owned();
                if name.is_empty() {
                    return Err(Broken);
                }
                self.name = Some(name);
                (self.is_bare, self.key) = (true, "\"arguments\"".into());
                self.value(c, found)?;
            }
            Place::Bare => self.key.push(c),
            Place::Key => match c {
                '"' => (self.place, self.key) = (Place::InKey, c.into()),
                '}' => self.end_call(found)?,
                ',' => {}
                _ => return Err(Broken),
            },
            Place::InKey => {
                self.key.push(c);
                if self.ends_string(c) {
                    self.place = Place::Colon;
                }
            }
            Place::Colon if c == ':' => self.place = Place::Value,
            Place::Colon => return Err(Broken),
            Place::Value => self.value(c, found)?,
            Place::InValue => self.in_value(c, found)?,
            Place::AfterValue => match c {
                ',' => self.place = Place::Key,
                '}' => self.end_call(found)?,
                _ => return Err(Broken),
            },
            Place::AfterCall => self.after_call(c, found),
        }
        Ok(())
    }

    fn begin(&mut self, c: char) -> Result<(), Broken> {
        match c {
            '[' if !self.listed => self.listed = true,
            '{' => self.place = Place::Key,
            _ if self.bare && !self.listed => (self.place, self.key) = (Place::Bare, c.into()),
            _ => return Err(Broken),
        }
        Ok(())
    }

    /// Whether a character ends the string that it is in.
    fn ends_string(&mut self, c: char) -> bool {
        match (self.escaped, c) {
            (true, _) => self.escaped = false,
            (false, '\\') => self.escaped = true,
            (false, '"') => return true,
            (false, _) => {}
        }
        false
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "\"arguments\"" | "\"parameters\"")
    }

    /// The first character of a value.
    fn value(&mut self, c: char, found: &mut Vec<Found>) -> Result<(), Broken> {
        if matches!(c, '}' | ']' | ',' | ':') || (self.is_arguments() && self.arguments) {
            return Err(Broken);
        }
        self.place = Place::InValue;
        (self.value, self.depth, self.in_string) = (String::new(), 0, false);
        self.quoted = c == '"';
        if self.is_arguments() {
            self.arguments = true;
        }
        self.in_value(c, found)
    }

    fn in_value(&mut self, c: char, found: &mut Vec<Found>) -> Result<(), Broken> {
        if self.depth == 0 && !self.in_string && (c.is_whitespace() || ",}".contains(c)) {
            // A number, or a word: nothing closes it.
            self.end_value(found)?;
            return self.push(c, found);
        }
        let mut over = false;
        if self.in_string {
            if self.ends_string(c) {
                self.in_string = false;
                over = self.depth == 0;
            }
        } else {
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => {
                    self.depth = self.depth.checked_sub(1).ok_or(Broken)?;
                    over = self.depth == 0;
                }
                _ => {}
            }
        }
        if self.is_arguments() && !self.quoted {
            self.give(c, found);
        } else {
            self.value.push(c);
        }
        if over { self.end_value(found) } else { Ok(()) }
    }

    /// Hands arguments on, once there is a call.
    fn give(&mut self, c: char, found: &mut Vec<Found>) {
        self.held.push(c);
        self.open(found);
    }

    fn open(&mut self, found: &mut Vec<Found>) {
        let Some(name) = self.name.as_ref().filter(|_| self.arguments) else { return };
        if !std::mem::replace(&mut self.opened, true) {
            found.push(Found::Opened(name.clone()));
        }
        if !self.held.is_empty() {
            found.push(Found::Arguments(std::mem::take(&mut self.held)));
        }
    }

    fn end_value(&mut self, found: &mut Vec<Found>) -> Result<(), Broken> {
        self.place = Place::AfterValue;
        let value = std::mem::take(&mut self.value);
        let text = |json: &str| serde_json::from_str::<String>(json).map_err(|_| Broken);
        if self.is_arguments() && self.quoted {
            // JSON within JSON.
            self.held.push_str(&text(&value)?);
        } else if self.key == "\"name\"" {
            self.name = Some(text(&value)?);
        }
        self.open(found);
        if self.is_bare {
            self.place = Place::AfterCall;
            found.push(Found::Over);
        }
        Ok(())
    }

    fn end_call(&mut self, found: &mut Vec<Found>) -> Result<(), Broken> {
        if self.name.is_none() {
            return Err(Broken);
        }
        if !std::mem::replace(&mut self.arguments, true) {
            self.held.push_str("{}");
        }
        self.open(found);
        (self.name, self.arguments, self.opened) = (None, false, false);
        self.place = Place::AfterCall;
        Ok(())
    }

    fn after_call(&mut self, c: char, found: &mut Vec<Found>) {
        match c {
            ',' | ';' => self.place = Place::Before,
            ']' if self.listed => found.push(Found::Over),
            _ if c.is_whitespace() => {}
            // The next object of a sequence without separators.
            '{' => self.place = Place::Key,
            _ => found.push(Found::Over),
        }
    }
}
