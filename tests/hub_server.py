"A stand-in for the HTTP interface of the Hugging Face Hub: as much of it as `huggingface_hub` asks for when a model is read or written."
import base64, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

def sha1(data): return hashlib.sha1(data).hexdigest()

class Repo:
    "Commits, each a dictionary of files, and branches that name one."
    def __init__(self, private=False, gated=False):
        self.private, self.gated, self.commits, self.branches, self.messages = private, gated, {}, {}, []
        self.commit('main', {}, 'initial commit')

    def files(self, revision):
        commit = self.branches.get(revision, revision)
        return commit, self.commits.get(commit)

    def commit(self, branch, files, message):
        self.messages.append(message)
        commit = sha1(f'{len(self.commits)} {message}'.encode())
        self.commits[commit], self.branches[branch] = dict(files), commit
        return commit

class FakeHub(ThreadingHTTPServer):
    "The server; `repos`, `tokens` (token -> may write?) and `log` are there to be looked at and changed."
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repos, self.tokens, self.objects, self.log = {}, {}, {}, []
        self.fail, self.lfs_from = {}, 2000                  # (method, part of a path) -> status; bytes from which files are objects
        self.url = f'http://127.0.0.1:{self.server_address[1]}'
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()

    def stop(self):
        "End the server, and the connections that this process holds open to it."
        from huggingface_hub.utils import close_session
        self.shutdown()
        self.server_close()
        close_session()

    def put(self, name, files, branch='main', **kwargs):
        "Fill a repository without HTTP."
        return self.repos.setdefault(name, Repo(**kwargs)).commit(branch, files, 'put')

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass

    def answer(self, status=200, data=b'', headers=()):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for k, v in dict(headers).items(): self.send_header(k, v)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def problem(self, status, code, text=''): self.answer(status, {'error': text or code}, {'X-Error-Code': code, 'X-Error-Message': text or code})

    def body(self): return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def token(self): return (self.headers.get('Authorization') or '').removeprefix('Bearer ') or None

    def repo(self, name):
        "The repository, or None after the answer that it cannot be seen."
        found, token = self.server.repos.get(name), self.token()
        if token and token not in self.server.tokens: return self.problem(401, '', 'Invalid credentials in Authorization header')
        if found is None or found.private and not token: return self.problem(404 if token else 401, 'RepoNotFound')
        if found.gated and not token: return self.problem(403, 'GatedRepo')
        return found

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        for (method, part), status in self.server.fail.items():
            if method == self.command and part in path: return self.answer(status, {'error': 'broken'})
        for method, pattern, do in routes:
            if (method == self.command or method == 'GET' and self.command == 'HEAD') and (m := re.fullmatch(pattern, path)):
                return do(self, **m.groupdict())
        self.answer(404, {'error': f'no route for {self.command} {path}'})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # ---- reading

    def info(self, name, revision='main'):
        if not (repo := self.repo(name)): return
        commit, files = repo.files(revision)
        if files is None: return self.problem(404, 'RevisionNotFound')
        self.answer(200, {'id': name, 'modelId': name, 'sha': commit, 'private': repo.private, 'siblings': [{'rfilename': o} for o in files], 'tags': []})

    def tree(self, name, revision):
        if not (repo := self.repo(name)): return
        _, files = repo.files(revision)
        if files is None: return self.problem(404, 'RevisionNotFound')
        self.answer(200, [{'type': 'file', 'path': k, 'size': len(v), 'oid': sha1(v)} for k, v in files.items()])

    def resolve(self, name, revision, file):
        if not (repo := self.repo(name)): return
        commit, files = repo.files(revision)
        if files is None: return self.problem(404, 'RevisionNotFound')
        if file not in files: return self.problem(404, 'EntryNotFound')
        self.answer(200, files[file], {'ETag': f'"{sha1(files[file])}"', 'X-Repo-Commit': commit})

    # ---- writing

    def may_write(self, name):
        if not self.token() or self.token() not in self.server.tokens: return self.problem(401, '', 'Invalid credentials in Authorization header')
        if not self.server.tokens[self.token()]: return self.problem(403, '', 'You have read access but not the required permissions')
        return True

    def create(self):
        about = json.loads(self.body())
        name = f"{about['organization']}/{about['name']}" if about.get('organization') else about['name']
        if not self.may_write(name): return
        if name in self.server.repos: return self.answer(409, {'url': f'{self.server.url}/{name}', 'error': 'exists'})
        self.server.repos[name] = Repo(private=bool(about.get('private') or about.get('visibility') == 'private'))
        self.answer(200, {'url': f'{self.server.url}/{name}', 'id': name})

    def branch(self, name, branch):
        self.body()
        repo = self.may_write(name) and self.repo(name)
        if not repo: return
        if branch in repo.branches: return self.problem(409, '', 'Reference already exists')
        repo.branches[branch] = repo.branches['main']
        self.answer(200, {})

    def validate(self):
        text = json.loads(self.body())['content']
        ok = re.match(r'---\n.*?\n---\n', text, re.S)
        self.answer(200 if ok else 400, {'errors': [] if ok else [{'message': 'no metadata'}], 'warnings': []})

    def preupload(self, name, revision):
        files = json.loads(self.body())['files']
        if not self.may_write(name): return
        large = lambda o: o['size'] >= self.server.lfs_from
        self.answer(200, {'files': [{'path': o['path'], 'uploadMode': 'lfs' if large(o) else 'regular', 'shouldIgnore': False} for o in files]})

    def batch(self, name):
        objects = json.loads(self.body())['objects']
        do = lambda o: {'actions': {'upload': {'href': f"{self.server.url}/objects/{o['oid']}"}}}
        self.answer(200, {'transfer': 'basic', 'objects': [{**o, **({} if o['oid'] in self.server.objects else do(o))} for o in objects]},
            {'Content-Type': 'application/vnd.git-lfs+json'})

    def store(self, oid):
        if self.headers.get('Transfer-Encoding') == 'chunked':
            data = b''
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else: data = self.body()
        ok = hashlib.sha256(data).hexdigest() == oid
        if ok: self.server.objects[oid] = data
        self.answer(200 if ok else 400)

    def commit(self, name, revision):
        lines = [json.loads(o) for o in self.body().splitlines() if o]
        repo = self.may_write(name) and self.repo(name)
        if not repo: return
        asked = 'create_pr=1' in self.path
        _, files = repo.files(revision)
        if files is None: return self.problem(404, 'RevisionNotFound')
        files, message = dict(files), lines[0]['value']['summary']
        for o in lines[1:]:
            v = o['value']
            if o['key'] == 'file': files[v['path']] = base64.b64decode(v['content'])
            elif o['key'] == 'lfsFile': files[v['path']] = self.server.objects[v['oid']]
            elif o['key'] == 'deletedFile': files.pop(v['path'])
        commit = repo.commit('refs/pr/1' if asked else revision, files, message)
        page = f'{self.server.url}/{name}'
        self.answer(200, {'success': True, 'commitOid': commit, 'commitUrl': f'{page}/commit/{commit}', **({'pullRequestUrl': f'{page}/discussions/1'} if asked else {})})

_repo = r'(?P<name>[\w.-]+/[\w.-]+)'
routes = [
    ('POST', '/api/repos/create', Handler.create), ('POST', '/api/validate-yaml', Handler.validate),
    ('POST', f'/api/models/{_repo}/branch/(?P<branch>.+)', Handler.branch), ('POST', f'/api/models/{_repo}/preupload/(?P<revision>.+)', Handler.preupload),
    ('POST', f'/api/models/{_repo}/commit/(?P<revision>.+)', Handler.commit), ('POST', rf'/{_repo}\.git/info/lfs/objects/batch', Handler.batch),
    ('PUT', r'/objects/(?P<oid>\w+)', Handler.store), ('GET', f'/api/models/{_repo}/tree/(?P<revision>.+)', Handler.tree),
    ('GET', f'/api/models/{_repo}/revision/(?P<revision>.+)', Handler.info), ('GET', f'/api/models/{_repo}', Handler.info),
    ('GET', f'/{_repo}/resolve/(?P<revision>refs/pr/[0-9]+|[^/]+)/(?P<file>.+)', Handler.resolve)]
