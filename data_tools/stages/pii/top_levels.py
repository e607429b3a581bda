"""The top-level domains at which people have email addresses, of IANA's list."""

# Names of two letters that no country has are attributes and files: `a@b.mT`, `openssl@3.rb`. Left out are two that
# end the name of a file more often: .so and .py.
COUNTRIES = frozenset(
    "ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc "
    "cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga "
    "gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo jp "
    "ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms "
    "mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw qa re ro rs "
    "ru rw sa sb sc sd se sg sh si sk sl sm sn sr ss st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw "
    "tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw".split()
)
# Those that are in use. Others are attributes and names of units: `a@b.transpose`, `getty@tty1.service`.
GENERIC = frozenset(
    "com net org edu gov mil int info biz name pro mobi asia tel cat jobs travel museum aero coop post app dev page "
    "blog cloud shop store online site website tech xyz top club vip live life email mail world today news media "
    "agency group digital network systems solutions services academy school university foundation berlin london paris "
    "tokyo nyc koeln hamburg wien studio design space link help support health care clinic legal law expert guru team "
    "company center city fun art photo finance bank energy green solar global international  arpa ngo "
    "ong one zone work works rocks ninja chat social community events technology software engineering institute "
    "college training courses degree education study science computer computers host hosting press pub bar cafe "
    "restaurant pizza kitchen recipes wine beer coffee hotel holiday holidays house land estate property properties "
    "realty rentals apartments villas build builders construction repair cleaning garden flowers gifts toys games "
    "game play video tube film movie band music audio radio fm stream photography pictures gallery graphics ink "
    "dental dentist doctor hospital surgery vet fitness yoga run bike football golf tennis ski surf taxi limo cars "
    "auto autos car motorcycles boats yachts flights cruises tours vacations voyage viajes reisen immobilien "
    "versicherung haus kaufen jetzt gmbh ltd llc inc srl sarl tax loans loan money cash credit fund capital "
    "investments ventures partners holdings management consulting associates attorney lawyer accountant accountants "
    "insure charity church faith bible catholic gives democrat republican vote voting army navy airforce earth eco "
    "bio farm pet pets dog baby kids family love dating wedding singles gay lgbt lol wtf moe sucks ooo icu men women "
    "fashion style boutique clothing shoes jewelry diamonds gold luxury beauty hair makeup salon spa sale deals "
    "discount bid auction market marketing markets trade trading exchange forex broker bet casino poker bingo "
    "amsterdam brussels vlaanderen gent bayern ruhr saarland nrw swiss zuerich tirol wales scot cymru irish eus gal "
    "bzh alsace corsica istanbul moscow москва osaka kyoto nagoya okinawa taipei sydney melbourne miami boston vegas "
    "quebec rio capetown durban joburg africa lat arab krd kiwi abudhabi dubai google gle goog youtube amazon aws "
    "apple microsoft azure bing office xbox skype sky bmw audi seat volvo bosch siemens sap basf allianz ubs barclays "
    "hsbc dbs citi sbi canon sony toshiba hitachi ntt samsung lg uucp bitnet".split()
)
